"""Which engine answers which request: a pure function, alike on every rank."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def deal(lengths: Sequence[int], n_engines: int) -> list[list[int]]:
    """Deals requests to engines so that their summed lengths are nearly equal.

    Longest first, each to the least loaded engine, the lowest index on ties. The samples of one
    question, alike in length, so spread over the engines, and with them whatever turns out long.

    Args:
        lengths: expected tokens of each request, prompt and response, `[n_requests]`, positive.
        n_engines: number of engines; with fewer requests some engines get none.

    Returns:
        The request indices of each engine, ascending, `[n_engines]` lists.
    """
    hands: list[list[int]] = [[] for _ in range(n_engines)]
    loads = [(0, engine) for engine in range(n_engines)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, engine = heapq.heappop(loads)
        hands[engine].append(index)
        heapq.heappush(loads, (load + lengths[index], engine))
    return [sorted(hand) for hand in hands]
