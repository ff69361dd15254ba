"""The order in which an engine inside the training ranks sleeps and wakes; pure.

    generating -> sleep -> asleep -> wake_weights -> weights awake -> the weights are written
    -> weights written -> wake_cache -> generating

Asleep, weights and cache have lost what they held. Weights alone awake, an engine would wait for
its cache for ever; with both awake but nothing written, it would sample from noise.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

State = Literal["generating", "asleep", "weights awake", "weights written"]
Step = Literal["generate", "sleep", "wake_weights", "write", "wake_cache"]


class _Rule(NamedTuple):
    """The states in which a step does something, what it leads to, and where it is done already."""

    does: tuple[State, ...]
    leads_to: State | None
    done: tuple[State, ...] = ()


_RULES: dict[Step, _Rule] = {
    "generate": _Rule(("generating",), None),
    "sleep": _Rule(("generating",), "asleep", ("asleep",)),
    "wake_weights": _Rule(
        ("asleep",), "weights awake", ("weights awake", "weights written", "generating")
    ),
    "write": _Rule(("weights awake",), "weights written", ("weights written", "generating")),
    "wake_cache": _Rule(("weights written",), "generating", ("generating",)),
}


class WrongOrderError(RuntimeError):
    """A step was taken in a state that does not allow it: a mistake of the program."""


class Cycle:
    """Where an engine stands; begins in `state`, `generating` if its weights are those wanted."""

    def __init__(self, state: State = "generating") -> None:
        self.state: State = state

    @contextlib.contextmanager
    def step(self, name: Step) -> Iterator[bool]:
        """Takes a step in the block and moves on when that succeeds.

        Yields whether there is anything to do: a step that is done already may come again.

        Raises:
            WrongOrderError: The state does not allow it; names both.
        """
        rule = _RULES[name]
        if self.state not in rule.does + rule.done:
            allowed = " or ".join(rule.does)
            raise WrongOrderError(f"rollout engine: {name} while {self.state}, not {allowed}")
        due = self.state in rule.does
        yield due
        if due and rule.leads_to:
            self.state = rule.leads_to
