"""What the main thread of this process waits for: told to the watchdog, by whoever makes it wait.

Only the trainer's own exchanges and engine requests are announced. What waits inside Megatron, NCCL
or vLLM shows in the stacks.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Waiting:
    """The waits of the main thread, the innermost last, and how many exchanges it has begun."""

    def __init__(self) -> None:
        self.stack: list[Callable[[], str]] = []
        self.collectives = 0


_waiting = _Waiting()


@contextlib.contextmanager
def collective(name: str) -> Iterator[None]:
    """Announces an exchange between ranks, by its name, and counts it; main thread only."""
    _waiting.collectives += 1
    with waiting(lambda: name):
        yield


@contextlib.contextmanager
def waiting(what: Callable[[], str]) -> Iterator[None]:
    """Announces a wait; `what` is asked for words by another thread, if it comes to that."""
    _waiting.stack.append(what)
    try:
        yield
    finally:
        _waiting.stack.pop()


def pending() -> str:
    """Returns what is being waited for, the outermost first; from any thread."""
    return ", in it ".join(what() for what in list(_waiting.stack))


def collectives_begun() -> int:
    """Returns how many exchanges the main thread has begun."""
    return _waiting.collectives
