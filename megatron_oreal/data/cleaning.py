"""Which questions a training set is better without: repeated, contradictory, or held out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from megatron_oreal.data.overlap import near_duplicates, ngrams_of, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.data.overlap import HeldOut


class Reason(StrEnum):
    """Why a question goes."""

    DUPLICATE = "duplicate"  # the same words and answer as one before
    CONTRADICTION = "contradiction"  # the same words as another, with another answer
    NEAR_DUPLICATE = "near_duplicate"  # nearly the same words and the same answer
    HELD_OUT = "held_out"  # much of it stands in a question of an evaluation


@dataclass(frozen=True, slots=True)
class Removal:
    """One question that goes: why, because of which, and how much of the wording they share."""

    reason: Reason
    other: str
    share: float


@dataclass(frozen=True, slots=True)
class Cleaning:
    """How alike is too alike.

    Attributes:
        near_n: words in a row that near duplicates are compared by.
        near_threshold: least Jaccard index of near duplicates; above 1 looks for none.
        held_out_threshold: least share of n-grams in common with a held-out question.
    """

    near_n: int = 3
    near_threshold: float = 0.8
    held_out_threshold: float = 0.5


def find_removals(
    questions: Sequence[tuple[str, str, str]], held_out: HeldOut, settings: Cleaning
) -> dict[int, Removal]:
    """Returns what goes, by place; the first of several like questions stays.

    A question with other numbers, so with another answer, is another question: near duplicates must
    have the same answer. Where the same words have different answers, nobody knows which is right,
    and all go.

    Args:
        questions: `(name, question, gold answer)` of each.
        held_out: The questions of the evaluations.
        settings: How alike is too alike.
    """
    removals: dict[int, Removal] = {}
    for i, (_, question, _) in enumerate(questions):
        name, share = held_out.closest(question)
        if share >= settings.held_out_threshold:
            removals[i] = Removal(Reason.HELD_OUT, name, share)
    worded = {
        i: words_of(question) for i, (_, question, _) in enumerate(questions) if i not in removals
    }
    answers = {i: words_of(questions[i][2]) for i in worded}
    removals |= _repeated(questions, worded, answers)
    left = [i for i in worded if i not in removals]
    if settings.near_threshold <= 1:
        near = near_duplicates(
            [ngrams_of(worded[i], settings.near_n) for i in left],
            [answers[i] for i in left],
            settings.near_threshold,
        )
        for i, (j, share) in near.items():
            removals[left[i]] = Removal(Reason.NEAR_DUPLICATE, questions[left[j]][0], share)
    return removals


def _repeated(
    questions: Sequence[tuple[str, str, str]],
    worded: dict[int, tuple[str, ...]],
    answers: dict[int, tuple[str, ...]],
) -> dict[int, Removal]:
    same: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, words in worded.items():
        same[words].append(i)
    removals = {}
    for alike in same.values():
        agree = len({answers[i] for i in alike}) == 1
        for i in alike[1:] if agree else alike:
            other = alike[0] if i != alike[0] else alike[-1]
            reason = Reason.DUPLICATE if agree else Reason.CONTRADICTION
            removals[i] = Removal(reason, questions[other][0], 1.0)
    return removals
