r"""Answers that are words or the letters of choices, compared as text.

math-verify reads words as products of letters, where `dog` equals `god`.
"""

from __future__ import annotations

import re

from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import Comparison
from megatron_oreal.verify.spelling import as_text

_WORD = re.compile(r"[A-Za-z]{3,}|[Nn]o|[A-Za-z]{2,}(?:[ '-][A-Za-z]+)+")
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{2}) ?(?:([AaPp])\.?[Mm]\.?)?")
_LETTERS = re.compile(r"[({]?([A-J])[)}]?(?:(?:,| ?and ?)[({]?([A-J])[)}]?)*")
_LETTER = re.compile(r"(?<![A-Za-z])[A-Ja-j](?![A-Za-z])")
_CHOICE_AND_VALUE = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)]) ?(.+)")
_INTRODUCTION = re.compile(r"(?:option|choice|answer)s? ?", re.IGNORECASE)


def compare_words(gold: str, answer: str) -> Comparison | None:
    """Compares cleaned answers, of which the gold one is text; None where it is mathematics."""
    gold, answer = as_text(gold), _INTRODUCTION.sub("", as_text(answer))
    if _LETTERS.fullmatch(gold) or _CHOICE_AND_VALUE.fullmatch(gold):
        return _compare_choices(gold, answer)
    times = _TIME.fullmatch(gold), _TIME.fullmatch(answer)
    if times[0] and times[1] and (times[0][3] or times[1][3]):
        return _compare_times(times[0].groups(""), times[1].groups(""))
    if not _WORD.fullmatch(gold):
        return None
    gold, answer = gold.casefold(), answer.casefold()
    if gold == answer:
        return Comparison(Outcome.CORRECT, "same words")
    if _WORD.fullmatch(answer) and not {*gold.split()} & {*answer.split()}:
        return Comparison(Outcome.INCORRECT, "other words")
    return Comparison(Outcome.UNVERIFIED, "the gold answer is a text, the answer not the same")


def _compare_times(gold: tuple[str, ...], answer: tuple[str, ...]) -> Comparison:
    """Compares times of day; `AM` and `PM` may be left out."""
    halves = {half.upper() for half in (gold[2], answer[2]) if half}
    same = int(gold[0]) == int(answer[0]) and gold[1] == answer[1] and len(halves) == 1
    if same:
        return Comparison(Outcome.CORRECT, "same time")
    return Comparison(Outcome.INCORRECT, "another time")


def _compare_choices(gold: str, answer: str) -> Comparison | None:
    """Compares the letters of choices; `(B) 5` counts as B."""
    wanted, given = _choices(gold), _choices(answer)
    if given is None:
        single = _LETTERS.fullmatch(gold) is not None and len(gold) == 1
        if single and re.search(r"[=+^\\]|[a-z]", answer):
            return None  # the gold letter may be a variable
        return Comparison(Outcome.UNVERIFIED, "the gold answer is a choice, the answer is none")
    if wanted == given:
        return Comparison(Outcome.CORRECT, "same choice")
    return Comparison(Outcome.INCORRECT, "another choice")


def _choices(text: str) -> set[str] | None:
    value = _CHOICE_AND_VALUE.fullmatch(text)
    if value:
        return {value[1] or value[2]}
    if _LETTERS.fullmatch(text) or re.fullmatch(r"\(?[a-j]\)?", text):
        return {letter.upper() for letter in _LETTER.findall(text)}
    return None
