"""`megatron-oreal report`: one page of one run or more, once or again and again."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.report.choose import choose
from megatron_oreal.monitor.report.pack import pack, run_record
from megatron_oreal.monitor.report.page import render
from megatron_oreal.monitor.report.read import read_run
from megatron_oreal.monitor.run_folder import atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_TOKENS = 1_000_000  # response tokens in a page, about 16 bytes each


@dataclass(frozen=True)
class Request:
    """What a page is to show.

    Args:
        folders: of the runs; the first is the main one.
        iteration: whose transcripts alone are shown; None for those of the whole run.
        refresh_s: how often the page loads itself again; 0 for never.
        max_tokens: of all runs together; a sample where there are more. None for no bound.
        seed: of the sample.
    """

    folders: tuple[Path, ...]
    iteration: int | None = None
    refresh_s: float = 0.0
    max_tokens: int | None = MAX_TOKENS
    seed: int = 0


def read(request: Request) -> tuple[dict[str, Any], list[bytes]]:
    """Returns the data of a page and its chunks of tokens.

    Raises:
        UserError: A folder holds no run or no such iteration, or one of its files cannot be read.
    """
    runs = [read_run(folder, iteration=request.iteration) for folder in request.folders]
    if request.iteration is not None and not any(run.places for run in runs):
        raise UserError(f"--iteration {request.iteration}: has no transcripts; leave it out")
    share = None if request.max_tokens is None else request.max_tokens // len(runs)
    chosen = [choose(run.places, share, request.seed) for run in runs]
    packed = pack(runs, chosen)
    live = not all(run.finished for run in runs)
    data = {
        "runs": [run_record(run, i, packed) for i, run in enumerate(runs)],
        "items": packed.items,
        "pieces": packed.pieces,
        "ids": packed.ids,
        "iteration": request.iteration,
        "refresh_s": request.refresh_s if live else 0,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    return data, packed.chunks


def write(request: Request, out: Path) -> dict[str, Any]:
    """Writes the page, there whole or not at all, and returns its data.

    Raises:
        UserError: A run cannot be read, or the page not be written.
    """
    data, chunks = read(request)
    for run, folder in zip(data["runs"], request.folders, strict=True):
        run["place"] = os.path.relpath(folder, out.parent)  # links in the page start there
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, render(_title(data), data, chunks))
    except OSError as error:
        why = f"cannot be written ({error.strerror}); name another file"
        raise UserError(f"--out {out}: {why}") from error
    return data


def page_of_iteration(folder: Path, iteration: int, max_tokens: int) -> str:
    """Returns a page of one iteration's transcripts, or a sample of them, as text."""
    data, chunks = read(Request((folder,), iteration=iteration, max_tokens=max_tokens))
    return b"".join(render(_title(data), data, chunks)).decode()


def watch(
    request: Request, out: Path, say: Callable[[str], None], sleep: Callable[[float], None]
) -> None:
    """Writes the page again whenever the run has written something, until all runs are finished."""
    seen: list[int] = []
    while True:
        sizes = _sizes(request.folders)
        if sizes != seen:
            data = write(request, out)
            seen = sizes
            done = [_progress(run) for run in data["runs"]]
            say(f"{out}: {', '.join(done)}")
            if all(run["finished"] for run in data["runs"]):
                return
        sleep(request.refresh_s)


def summary(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what the page's overview says in words and numbers, one record a run."""
    kept = ("name", "folder", "finished", "learned", "time", "phases", "reward_model", "alarms")
    items = data["items"]
    return [
        {key: run[key] for key in kept}
        | {"blamed": [_blamed(items, i) for i in run["blamed"]], "transcripts": run["transcripts"]}
        for run in data["runs"]
    ]


def words(data: dict[str, Any], out: Path) -> list[str]:
    """Returns the overview's answers as lines for a terminal."""
    lines = []
    for run in summary(data):
        lines += [
            f"{run['name']}: {run['folder']}",
            f"  learned: {run['learned']['verdict']}. {' '.join(run['learned']['said'])}",
            f"  time: {' '.join(run['time'])}",
            f"  token reward model: {' '.join(run['reward_model'])}",
            *(f"  blamed: {_in_words(item)}" for item in run["blamed"]),
            f"  alarms: {len(run['alarms']) or 'none'}",
        ]
    return [*lines, str(out)]


def _title(data: dict[str, Any]) -> str:
    names = ", ".join(dict.fromkeys(run["name"] for run in data["runs"]))
    return f"{names} - OREAL run report"


def _in_words(item: dict[str, Any]) -> str:
    blamed = item["blamed"]
    before, own, after = blamed["context"]
    shown = [part.encode("unicode_escape").decode() for part in (before, own, after)]
    return (
        f"iteration {item['iteration']}, ...{shown[0]}>>{shown[1]}<<{shown[2]}...:"
        f" q {blamed['before']:.3f} -> {blamed['after']:.3f}, most weight"
        f" {blamed['heaviest_weight']:.3f} on token {blamed['heaviest']}"
    )


def _blamed(items: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    kept = ("iteration", "prompt_id", "sample", "prompt", "gold_answer", "extracted", "blamed")
    return {"item": index} | {key: items[index].get(key) for key in kept}


def _progress(run: dict[str, Any]) -> str:
    done = len(run["train"].get("iteration", []))
    return f"{run['name']} {done} of {run['iterations_planned'] or '?'} iterations"


def _sizes(folders: Sequence[Path]) -> list[int]:
    names = ("metrics.jsonl", "alarms.jsonl", "summary.json")
    paths = [folder / name for folder in folders for name in names]
    return [path.stat().st_size if path.exists() else -1 for path in paths]
