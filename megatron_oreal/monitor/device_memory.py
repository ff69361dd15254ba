"""Memory in use on a rank's device at the end of each phase, against what was planned for it.

Asked of the driver: torch counts what an engine that sleeps has given back as if it were there.
What torch keeps of a phase stays in use until the engines take it: the end of a phase shows its
most, or that of one before it in the same half of an iteration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_GIB = 1 << 30


class DeviceMemory:
    """Looks whenever a phase ends; not collective.

    Args:
        planned: bytes by phase; a phase without a plan is passed over.
        used: says how many bytes are in use.
    """

    def __init__(self, planned: Mapping[str, int], used: Callable[[], int]) -> None:
        self._planned, self._used = dict(planned), used
        self._most: dict[str, int] = {}

    def left(self, phase: str) -> None:
        """Takes the end of a phase."""
        if phase in self._planned:
            self._most[phase] = max(self._used(), self._most.get(phase, 0))

    @property
    def share_of_plan(self) -> float:
        """The most, over the phases of this iteration, of what is used over what was planned."""
        return max((used / self._planned[phase] for phase, used in self._most.items()), default=0.0)

    def end_iteration(self) -> dict[str, float]:
        """Returns `{"memory/<phase>_used_gib": GiB}` since the last call and begins anew."""
        ended, self._most = self._most, {}
        return {f"memory/{phase}_used_gib": used / _GIB for phase, used in ended.items()}
