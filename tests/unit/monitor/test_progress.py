from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_oreal.monitor.progress import Progress


def run(console: Console, enabled: bool) -> str:
    progress = Progress(enabled, console)
    with progress.task("generate", total=4, unit="responses") as advance:
        advance(3)
        with progress.task("judge", total=2, unit="answers") as inner:
            inner(2)
        console.print("a line in between")
        advance(1)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_terminal_shows_the_bars() -> None:
    shown = run(Console(file=io.StringIO(), force_terminal=True, width=100), enabled=True)
    assert "generate" in shown
    assert "judge" in shown
    assert "3/4" in shown
    assert "responses" in shown
    assert "a line in between" in shown


def test_no_terminal_or_another_rank_shows_nothing() -> None:
    assert run(Console(file=io.StringIO()), enabled=True) == "a line in between\n"
    silent = run(Console(file=io.StringIO(), force_terminal=True, width=100), enabled=False)
    assert silent == "a line in between\n"


def test_a_failure_takes_the_bars_away() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = Progress(True, console)
    with pytest.raises(RuntimeError), progress.task("generate", total=1, unit="responses"):
        raise RuntimeError
    with progress.task("again", total=1, unit="responses") as advance:
        advance(1)
