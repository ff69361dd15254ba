"""Progress bars of long phases; silent where nobody watches."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _RateColumn(ProgressColumn):
    """Units a second, of late."""

    def render(self, task: Task) -> Text:
        """Returns the rate, empty while it is not known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "")


class Progress:
    """One live display for all bars of a run.

    Args:
        enabled: false on every rank but the first.
        console: shared with the console sink, whose lines then appear above the bars.
    """

    def __init__(self, enabled: bool, console: Console | None = None) -> None:
        console = console or Console()
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not (enabled and console.is_terminal),
        )
        self._open = 0

    @contextmanager
    def task(self, name: str, total: int, unit: object) -> Iterator[Callable[[int], None]]:
        """Shows a bar while the `with` block runs and yields `advance(n)`; tasks may nest.

        The unit is asked for its text at every refresh.
        """
        bar = self._bars.add_task(name, total=total, unit=unit)
        self._open += 1
        self._bars.start()

        def advance(n: int) -> None:
            self._bars.advance(bar, n)

        try:
            yield advance
        finally:
            self._bars.remove_task(bar)
            self._open -= 1
            if self._open == 0:
                self._bars.stop()
