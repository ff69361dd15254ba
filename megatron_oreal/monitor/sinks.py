"""Where metrics go: a file of JSON lines, the console, wandb; only one rank opens any."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from megatron_oreal.monitor.metrics import Kind, to_json
from megatron_oreal.monitor.wandb_sink import WandbSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from megatron_oreal.config.schema import Config
    from megatron_oreal.monitor.run_folder import RunFolder

# (metric, label on the console, format), the most telling first: what does not fit is left out
COLUMNS = (
    ("rollout/pass_rate", "pass", ".3f"),
    ("oreal/loss", "loss", ".4g"),
    ("sft/loss", "loss", ".4g"),
    ("token_rm/loss", "rm", ".4g"),
    ("token_rm/accuracy", "rm acc", ".2f"),
    ("oreal/kl_k3", "kl", ".2g"),
    ("oreal/entropy", "H", ".3f"),
    ("rollout/response_length_mean", "len", ".0f"),
    ("time/iteration_s", "s", ".1f"),
    ("rollout/mismatch_mean", "mismatch", ".1e"),
)
EVAL_PREFIX = "eval/"
WIDTH = 120


class Sink(Protocol):
    """Takes the metrics of one iteration or evaluation."""

    def write(self, iteration: int, metrics: Mapping[str, float], kind: Kind = "train") -> None:
        """Writes them; may be called more than once for an iteration after a resume."""
        ...

    def show(self, iteration: int, rollouts: Sequence[Mapping[str, Any]], page: str) -> None:
        """Shows rollouts, lines of a transcript file, and an HTML page of their tokens."""
        ...

    def close(self) -> None:
        """Writes what is pending; nothing is written afterwards."""
        ...


class Sinks:
    """Writes to several sinks in turn; a sink itself, silent where it holds none.

    What a disk refuses is told by `alarm` and ends nothing.
    """

    def __init__(self, sinks: Sequence[Sink], alarm: Callable[[str], None]) -> None:
        self._sinks, self._alarm = tuple(sinks), alarm

    @property
    def metrics_bytes(self) -> int:
        """Length of `metrics.jsonl` with all that was handed on, 0 where there is no such sink."""
        return sum(sink.length for sink in self._sinks if isinstance(sink, JsonlSink))

    @property
    def wandb_id(self) -> str:
        """The id of the run in wandb, empty where there is none."""
        return next((sink.id for sink in self._sinks if isinstance(sink, WandbSink)), "")

    def write(self, iteration: int, metrics: Mapping[str, float], kind: Kind = "train") -> None:
        """Writes to each sink, in order."""
        for sink in self._sinks:
            with self._told(f"metrics of iteration {iteration} are not written yet"):
                sink.write(iteration, metrics, kind)

    def show(self, iteration: int, rollouts: Sequence[Mapping[str, Any]], page: str) -> None:
        """Shows rollouts on each sink, in order."""
        for sink in self._sinks:
            with self._told(f"rollouts of iteration {iteration} are not shown"):
                sink.show(iteration, rollouts, page)

    def close(self) -> None:
        """Closes each sink, in order."""
        for sink in self._sinks:
            with self._told("the last metrics are not written"):
                sink.close()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._alarm(f"alarm: {what} ({error})")


class JsonlSink:
    """Appends one line of strict JSON a call, on the disk when `write` returns.

    A line that a killed run left half written is cut off when the file is opened, and with
    `keep_bytes` all that lies beyond: a resumed run writes it again. Lines that the disk refuses
    are kept and go before the next one.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        self._file = path.open("a+b", buffering=0)
        if keep_bytes is not None and keep_bytes < path.stat().st_size:
            self._file.truncate(keep_bytes)
        self._written = self._cut_torn_line()
        self._pending = b""

    @property
    def length(self) -> int:
        """Bytes of all lines, those that the disk has refused so far included."""
        return self._written + len(self._pending)

    def write(self, iteration: int, metrics: Mapping[str, float], kind: Kind = "train") -> None:
        """Appends `{"kind": ..., "iteration": ..., <name>: <value>...}`.

        Raises:
            OSError: The file system refuses; the line is kept.
        """
        line = to_json({"kind": kind, "iteration": iteration, **metrics})
        self._pending += f"{line}\n".encode()
        self._append()

    def show(self, iteration: int, rollouts: Sequence[Mapping[str, Any]], page: str) -> None:
        """Shows nothing: the transcripts are files already."""

    def close(self) -> None:
        """Closes the file, after one more try where lines are pending.

        Raises:
            OSError: The file system refuses; these lines are lost.
        """
        with self._file:
            self._append()

    def _append(self) -> None:
        try:
            rest = memoryview(self._pending)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._written)
            raise
        self._written, self._pending = self.length, b""

    def _cut_torn_line(self) -> int:
        """Returns the length of the file then."""
        self._file.seek(0)
        return self._file.truncate(self._file.read().rfind(b"\n") + 1)


class ConsoleSink:
    """Prints one line an iteration, at most 120 columns wide."""

    def __init__(self, iterations: int, console: Console) -> None:
        self._iterations = iterations
        self._console = console

    def write(self, iteration: int, metrics: Mapping[str, float], kind: Kind = "train") -> None:
        """Prints the metrics of `COLUMNS` that were measured; of an evaluation, all its own."""
        columns = COLUMNS if kind == "train" else _eval_columns(metrics)
        line = summary_line(iteration, self._iterations, metrics, columns, kind)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, iteration: int, rollouts: Sequence[Mapping[str, Any]], page: str) -> None:
        """Shows nothing: a line has no room for them."""

    def close(self) -> None:
        """Has nothing pending."""


def summary_line(
    iteration: int,
    iterations: int,
    metrics: Mapping[str, float],
    columns: Sequence[tuple[str, str, str]] = COLUMNS,
    kind: Kind = "train",
) -> str:
    """Returns the console line; columns that were not measured or do not fit are left out."""
    width = len(str(iterations))
    line = f"{kind:5} {iteration:{width}d}/{iterations}"
    for name, label, form in columns:
        cell = f"  {label} {metrics[name]:{form}}" if name in metrics else ""
        if len(line) + len(cell) <= WIDTH:
            line += cell
    return line


def open_sinks(
    config: Config,
    folder: RunFolder,
    console: Console,
    *,
    steps: int,
    enabled: bool,
    keep_bytes: int | None = None,
    wandb_id: str = "",
) -> Sinks:
    """Opens every sink the config asks for, or none where `enabled` is false; not collective.

    Args:
        config: of the run.
        folder: of the run, made before.
        console: shared with the progress bars.
        steps: how many lines a whole run has.
        enabled: true on one rank only.
        keep_bytes: of the metrics that are there already; None for all.
        wandb_id: of the run in wandb that is gone on with; empty to look for one in the folder.

    Raises:
        UserError: if wandb is asked for and cannot be had.
    """

    def alarm(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not enabled:
        return Sinks([], alarm)
    sinks: list[Sink] = [
        JsonlSink(folder.metrics, keep_bytes),
        ConsoleSink(steps, console),
    ]
    mode, project = config.monitor.wandb, config.monitor.wandb_project
    if mode != "disabled":
        name, shown = config.run.name, asdict(config)
        sinks.append(WandbSink(folder.root, mode, project, name, shown, run_id=wandb_id))
    return Sinks(sinks, alarm)


def _eval_columns(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    own = [name for name in metrics if name.startswith(EVAL_PREFIX)]
    return [(name, name.removeprefix(EVAL_PREFIX), ".3g") for name in own]
