"""Which transcripts a page can hold: a seeded sample of whole questions, spread over the run."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import TYPE_CHECKING

from megatron_oreal.monitor.report.read import Place, questions

if TYPE_CHECKING:
    from collections.abc import Hashable

_STRETCHES = 30  # parts of a run that are drawn from alike
_QUARTERS = 4  # of pass rates
PAIR = 2


def choose(places: list[Place], max_tokens: int | None, seed: int) -> list[Place]:
    """Draws transcripts of at most `max_tokens` response tokens in all, in the run's order.

    None is no bound.

    What is drawn is a question with its answers, so that correct and incorrect stand side by side:
    all its answers that are on the disk where there is room for everything, else a pair that was
    trained on, or one answer. The strata are stretch of the run x quarter of pass rates x verdicts;
    each gives one question after the other until the page is full.
    """
    tokens = sum(place.head.response_length for place in places)
    if max_tokens is None or tokens <= max_tokens:
        return _in_order(places)
    rng = random.Random(f"report {seed}")
    last = max(place.head.iteration for place in places)
    strata: dict[Hashable, list[list[Place]]] = defaultdict(list)
    for answers in questions(places):
        few = _few(answers)
        strata[_stratum(few, last)].append(few)
    for stratum in strata.values():
        rng.shuffle(stratum)
    queues = [strata[key] for key in sorted(strata, key=str)]
    chosen: list[Place] = []
    room = max_tokens
    while queues:
        rng.shuffle(queues)
        for queue in queues:
            answers = queue.pop()
            length = sum(place.head.response_length for place in answers)
            if length <= room:
                chosen += answers
                room -= length
        queues = [queue for queue in queues if queue]
    return _in_order(chosen)


def _few(answers: list[Place]) -> list[Place]:
    """Returns one trained answer of each verdict of a question, or its first answer."""
    by_outcome = {place.head.outcome: place for place in reversed(answers) if place.head.trained}
    return list(by_outcome.values())[:PAIR] or answers[:1]


def _stratum(answers: list[Place], last: int) -> tuple[int, int, str]:
    head = answers[0].head
    rate = -1 if head.pass_rate is None else min(int(_QUARTERS * head.pass_rate), _QUARTERS - 1)
    verdicts = ",".join(sorted(str(place.head.outcome) for place in answers))
    return math.floor(head.iteration / (last + 1) * _STRETCHES), rate, verdicts


def _in_order(places: list[Place]) -> list[Place]:
    return sorted(places, key=lambda p: (p.head.iteration, p.head.prompt_id, p.head.sample))
