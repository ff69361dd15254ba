"""Seconds by phase, per iteration and over the whole run."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Timers:
    """Measures phases by the clock of this rank; phases may nest and then both count.

    Args:
        synchronize: called at both ends of a phase, so that work queued on a device counts in the
            phase that queued it; None where nothing is queued.
        totals: seconds by phase of the run before it was resumed.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        totals: Mapping[str, float] | None = None,
    ) -> None:
        self._synchronize = synchronize
        self._totals = dict(totals or {})
        self._iteration: dict[str, float] = {}
        self._ended = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of the `with` block to `name`, those up to an exception included."""
        started = self._now()
        try:
            yield
        finally:
            seconds = self._now() - started
            self._iteration[name] = self._iteration.get(name, 0.0) + seconds
            self._totals[name] = self._totals.get(name, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Returns the seconds of `name` in this iteration so far; KeyError if it never ran."""
        return self._iteration[name]

    def end_iteration(self) -> dict[str, float]:
        """Returns `{"time/<phase>_s": seconds}` since the last call and starts anew."""
        ended, self._iteration = self._iteration, {}
        return {f"time/{name}_s": seconds for name, seconds in ended.items()}

    def wall(self) -> float:
        """Returns the seconds since the last call, those between phases included."""
        before, self._ended = self._ended, self._now()
        return self._ended - before

    @property
    def totals(self) -> dict[str, float]:
        """Seconds by phase over the whole run."""
        return dict(self._totals)

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()
