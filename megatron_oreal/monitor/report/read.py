"""A run's folder as plain data: metrics, alarms, and the heads of its transcripts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import read_yaml
from megatron_oreal.monitor.metrics import read_metrics
from megatron_oreal.monitor.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# Clocks that lie inside a phase or add phases up.
_NO_PHASE = frozenset(
    {"time/iteration_s", "time/wall_s", "time/eval_s", "time/last_verdict_wait_s"}
    | {"time/checkpoint_write_s"}
)


class Head(msgspec.Struct, frozen=True):
    """What the choice of transcripts goes by: a line of a transcript file without its texts."""

    iteration: int
    prompt_id: str
    sample: int
    response_length: int = 0
    pass_rate: float | None = None
    reward: float | None = None
    outcome: str | None = None
    trained: bool = False
    score: float | None = None


@dataclass(frozen=True)
class Place:
    """A transcript on the disk: its file, its line from 0, and its head."""

    path: Path
    line: int
    head: Head


@dataclass(frozen=True)
class RunData:
    """A run, finished or live, as its folder tells it."""

    name: str
    folder: RunFolder
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    places: list[Place]
    finished: bool
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def iterations_planned(self) -> int | None:
        """How many iterations the run was started for."""
        return _integer(self.config.get("schedule", {}).get("iterations"))

    @property
    def score_is_before(self) -> bool:
        """Whether s_t has read the tokens before t alone, as `oreal.token_score` says."""
        return self.config.get("oreal", {}).get("token_score", "before") != "at"


def read_run(root: Path, *, iteration: int | None = None) -> RunData:
    """Reads the folder of a run; the transcripts of one iteration alone where it is named.

    Raises:
        UserError: There is no run, or one of its files cannot be read.
    """
    folder = RunFolder(root)
    if not folder.metrics.exists():
        raise UserError(f"{root}: holds no metrics.jsonl; name the folder of a run")
    lines = read_metrics(folder.metrics)
    config = read_yaml(folder.config) if folder.config.exists() else {}
    name = str(config.get("run", {}).get("name") or root.name)
    return RunData(
        name=name,
        folder=folder,
        config=config,
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=[line for line in lines if line["kind"] == "eval"],
        alarms=_read_alarms(folder.alarms),
        places=_read_places(folder.rollouts, iteration),
        finished=folder.summary.exists(),
        phases=phases_of(lines),
    )


def phases_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the seconds of each phase over all lines, the longest first."""
    seconds: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("time/") and name not in _NO_PHASE:
                phase = name.removeprefix("time/").removesuffix("_s")
                seconds[phase] = seconds.get(phase, 0.0) + float(value)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _read_alarms(path: Path) -> list[dict[str, Any]]:
    """Returns each alarm as its beginning says it, with `ended`: its last iteration, or None.

    A last line that is being written is left for the next time.
    """
    if not path.exists():
        return []
    alarms: list[dict[str, Any]] = []
    on: dict[str, dict[str, Any]] = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            event = json.loads(line)
            if event["event"] == "began":
                on[event["kind"]] = event | {"ended": None}
                alarms.append(on[event["kind"]])
            elif event["kind"] in on:
                on.pop(event["kind"])["ended"] = event["iteration"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds a line that is no alarm; delete it") from error
    return alarms


def _read_places(folder: Path, iteration: int | None) -> list[Place]:
    pattern = "iter_*.jsonl" if iteration is None else f"iter_{iteration:06d}.jsonl"
    decoder = msgspec.json.Decoder(Head)
    places = []
    for path in sorted(folder.glob(pattern)):
        number = -1
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file):
                    places.append(Place(path, number, decoder.decode(line)))
        except msgspec.DecodeError as error:
            raise UserError(f"{path}:{number + 1}: no transcript ({error})") from error
    return places


def read_texts(path: Path, lines: list[int]) -> dict[int, dict[str, Any]]:
    """Reads some lines of a transcript file whole, by their number."""
    wanted = set(lines)
    with path.open("rb") as file:
        return {number: json.loads(line) for number, line in enumerate(file) if number in wanted}


def questions(places: list[Place]) -> list[list[Place]]:
    """Returns the transcripts of each question of each iteration together, in their order."""
    ordered = sorted(places, key=lambda place: (place.head.iteration, place.head.prompt_id))
    keys = [(place.head.iteration, place.head.prompt_id) for place in ordered]
    starts = [i for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
    return [ordered[a:b] for a, b in pairwise([*starts, len(ordered)])]


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None
