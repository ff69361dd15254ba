"""Evaluation suites: question files of one folder, asked for by name (docs/evaluation.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_oreal.config.errors import UserError

FETCH = "python tools/fetch_suites.py"


@dataclass(frozen=True, slots=True)
class SuiteChoice:
    """One suite that was asked for: its name, its file, and the responses of each question."""

    name: str
    path: str
    samples: int


def choose_suites(wanted: str, folder: str | Path, samples: int) -> list[SuiteChoice]:
    """Reads `math500,aime24:32`: names, each with its own number of responses if it has one.

    Args:
        wanted: What was asked for.
        folder: Where `NAME.jsonl` lie.
        samples: The number of responses where none is given.

    Raises:
        UserError: An empty or repeated name, a number that is none, or a suite that is not there;
            names those that are and how to fetch others.
    """
    chosen: dict[str, SuiteChoice] = {}
    for entry in wanted.split(","):
        name, colon, number = entry.strip().partition(":")
        if not name or name in chosen:
            raise UserError(f"--suite={wanted}: name each suite once, with commas between them")
        if colon and not (number.isascii() and number.isdigit() and int(number)):
            raise UserError(f"--suite={wanted}: {entry.strip()}: write NAME:RESPONSES, 1 or more")
        file = Path(folder) / f"{name}.jsonl"
        if "/" in name or not file.is_file():
            raise UserError(_missing(name, Path(folder)))
        chosen[name] = SuiteChoice(name, str(file), int(number) if colon else samples)
    return list(chosen.values())


def _missing(name: str, folder: Path) -> str:
    there = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl"))) or "none"
    return (
        f"--suite={name}: no such file in evaluation.suites_folder={folder}, which has {there}:"
        f" fetch it with `{FETCH} {name} --output {folder}`, or write {folder}/{name}.jsonl"
    )
