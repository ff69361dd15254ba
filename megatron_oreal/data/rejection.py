"""Demonstrations out of a model's own correct responses: distinct ones, of all lengths.

Correct responses are shorter than others, and easy questions have more of them: kept as they come,
they would teach a model to answer easy questions briefly.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.data.overlap import words_of
from megatron_oreal.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class Chosen:
    """A response that is to be learnt; `rank` counts from 0 among those of its question."""

    id: str
    question: str
    response: str
    tokens: int
    rank: int


def choose(group: RolloutGroup, most: int) -> list[Chosen]:
    """Returns at most `most` correct and different responses, from the shortest to the longest.

    Of more than that, those at even steps through their order by length; of two that differ in
    spacing or typesetting alone the first counts.
    """
    different: dict[tuple[str, ...], tuple[str, int]] = {}
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        if verdict.outcome is Outcome.CORRECT and rollout.stopped and rollout.text.strip():
            different.setdefault(words_of(rollout.text), (rollout.text, len(rollout.tokens)))
    by_length = sorted(different.values(), key=lambda response: response[1])
    kept = [by_length[i] for i in even_steps(len(by_length), most)]
    prompt = group.prompt
    return [
        Chosen(prompt.id, prompt.question, text, tokens, rank)
        for rank, (text, tokens) in enumerate(kept)
    ]


def even_steps(n: int, most: int) -> list[int]:
    """Returns at most `most` of the places 0 .. n - 1, both ends among them; of one the middle."""
    if n <= most:
        return list(range(n))
    if most == 1:
        return [(n - 1) // 2]
    return [round(i * (n - 1) / (most - 1)) for i in range(most)]


def length_bin(tokens: int) -> int:
    """Returns b for lengths of 2^b up to 2^(b+1) - 1 tokens."""
    return tokens.bit_length() - 1


def balance_lengths(chosen: Sequence[Chosen], most: float, seed: int) -> list[Chosen]:
    """Thins out the lengths that there are too many of; returns what stays, in the same order.

    Lengths are counted by powers of two. A power may have `most` times the median of all that
    occur; beyond that those go first that are not the first of their question, then by a seeded
    draw.
    """
    bins: defaultdict[int, list[int]] = defaultdict(list)
    for i, one in enumerate(chosen):
        bins[length_bin(one.tokens)].append(i)
    if not bins:
        return []
    cap = max(1, int(most * statistics.median(map(len, bins.values()))))
    rng = random.Random(f"lengths {seed}")
    stay: set[int] = set()
    for _, places in sorted(bins.items()):
        rng.shuffle(places)
        stay.update(sorted(places, key=lambda i: chosen[i].rank)[:cap])
    return [chosen[i] for i in sorted(stay)]
