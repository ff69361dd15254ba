r"""Decides whether two mathematical answers are equal. Runs in a verification worker only.

docs/verifier.md has the policy. In this order: texts that are the same; gold answers that are words
or choices; shapes (lists, sets, intervals, matrices), part by part; plain numbers, exactly; units;
all else as sympy expressions, read by `reader.py` and compared by math-verify.

"Not equal" is said only of a pair that was read on both sides, or of an answer in plain arithmetic
characters that is no expression (`3+`). An answer that could not be read for another reason is
UNVERIFIED: it may be right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import sympy
import sympy.physics.units  # `simplify` does, which runs texts of its own: too late once sealed
from math_verify import verify

from megatron_oreal.types import Outcome
from megatron_oreal.verify.numbers import PlainNumber, read_number, same_number
from megatron_oreal.verify.protocol import Comparison, Pair
from megatron_oreal.verify.reader import RefusedError, UnreadableError, read
from megatron_oreal.verify.shapes import compare_shapes
from megatron_oreal.verify.spelling import as_text, clean, hidden_character
from megatron_oreal.verify.units import ratio_of_units, split_unit
from megatron_oreal.verify.words import compare_words

if TYPE_CHECKING:
    from fractions import Fraction

_PLAIN_ARITHMETIC = re.compile(r"[0-9+\-*/^().,=! ]{0,64}")
_SIDE_BY_SIDE = re.compile(r"(?<!\\frac )(?<!_)[0-9] [0-9]")  # the grammar would multiply the two
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|exp|sqrt|text|frac)[^a-z])[A-Za-z]{3,}")
_PARAMETERS = {"k", "m", "n", "c"}  # of families of solutions, free to be named otherwise
_DEGREES = re.compile(r"([0-9.]+) ?\^\{\\circ\}")
_DIGIT_LIMIT = 15  # of a numerical comparison

# What sympy raises on expressions it cannot compare; anything else ends the worker, which leaves
# the pair UNVERIFIED too.
_NOT_COMPARABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def compare(pair: Pair, tolerance: float = 0.0) -> Comparison:
    """Compares an answer with the gold answer; without bounds in time and memory of its own.

    Args:
        pair: the gold answer and the answer.
        tolerance: relative difference allowed between numbers of which one is a decimal.
    """
    for whose, text in (("gold answer", pair.gold), ("answer", pair.answer)):
        hidden = hidden_character(text)
        if hidden:
            return Comparison(Outcome.UNVERIFIED, f"the {whose} holds the character {hidden}")
    gold, answer = clean(pair.gold), clean(pair.answer)
    if as_text(gold) == as_text(answer):
        return Comparison(Outcome.CORRECT, "same text")
    by_words = compare_words(gold, answer)
    if by_words is not None:
        return by_words
    return compare_shapes(gold, answer, lambda g, a: _compare_scalars(g, a, tolerance))


def _compare_scalars(gold: str, answer: str, tolerance: float) -> Comparison:
    """Compares two answers without brackets, commas or relations around them."""
    left, right = read_number(gold), read_number(answer)
    if left and right:
        return _verdict(same_number(left, right, tolerance))
    if as_text(gold) == as_text(answer):
        return Comparison(Outcome.CORRECT, "same text")
    gold_body, gold_unit = split_unit(gold)
    body, unit = split_unit(answer)
    angle = "^{\\circ}^1"
    if angle in (gold_unit, unit) and r"\pi" in gold + answer:
        gold, answer = _in_radians(gold_body, gold_unit), _in_radians(body, unit)
    elif gold_unit or unit:
        return _compare_with_units((gold_body, gold_unit), (body, unit), tolerance)
    return _compare_expressions(gold, answer, tolerance)


def _in_radians(body: str, unit: str) -> str:
    return rf"\frac{{({body})\pi}}{{180}}" if unit else body


def _compare_with_units(
    gold: tuple[str, str], answer: tuple[str, str], tolerance: float
) -> Comparison:
    """Compares bodies whose units are known to each other."""
    ratio = ratio_of_units(gold[1], answer[1])
    same = compare_shapes(gold[0], answer[0], lambda g, a: _compare_bodies(g, a, tolerance, ratio))
    if ratio is None and same.outcome is not Outcome.UNVERIFIED:
        return Comparison(Outcome.UNVERIFIED, "another unit")
    return same


def _compare_bodies(gold: str, answer: str, tolerance: float, ratio: Fraction | None) -> Comparison:
    left, right = read_number(gold), read_number(answer)
    if left and right:
        scaled = PlainNumber(right.value * (ratio or 1), right.percent, right.decimal, right.base)
        return _verdict(same_number(left, scaled, tolerance))
    if ratio not in (None, 1):
        answer = rf"\frac{{{ratio.numerator}}}{{{ratio.denominator}}}({answer})"
    return _compare_expressions(gold, answer, tolerance)


def _compare_expressions(gold: str, answer: str, tolerance: float) -> Comparison:
    """Compares two answers as sympy expressions."""
    found = []
    for whose, text in (("gold answer", gold), ("answer", answer)):
        try:
            if _SIDE_BY_SIDE.search(text):
                raise UnreadableError("two numbers side by side")
            found.append(read(_DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)))
        except RefusedError as error:
            return Comparison(Outcome.UNVERIFIED, f"the {whose} is refused: {error}")
        except UnreadableError:
            if whose == "answer" and _PLAIN_ARITHMETIC.fullmatch(text):
                return Comparison(Outcome.INCORRECT, "not an expression")
            return Comparison(Outcome.UNVERIFIED, f"the {whose} could not be read")
    left, right = found
    try:
        decimal = tolerance > 0 and "." in gold + answer
        equal = _equal(left, right) or (decimal and _close(left, right, tolerance))
    except _NOT_COMPARABLE as error:
        return Comparison(Outcome.UNVERIFIED, f"not comparable: {type(error).__name__}")
    doubt = "" if equal else _doubt(gold, answer, left, right)
    return Comparison(Outcome.UNVERIFIED, doubt) if doubt else _verdict(equal)


def _doubt(gold: str, answer: str, left: Any, right: Any) -> str:
    """Returns why two answers that are not equal may still mean the same; empty if they do not."""
    if set(_WORD.findall(answer)) - set(_WORD.findall(gold)):
        return "the answer holds words"
    names = [{str(symbol) for symbol in side.free_symbols} for side in (left, right)]
    renamed = names[0] != names[1] and all(len(n) == 1 and n <= _PARAMETERS for n in names)
    return "a parameter of another name" if renamed else ""


def _equal(gold: Any, answer: Any) -> bool:
    if answer.has(sympy.nan, sympy.zoo):
        return False
    both = isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)
    if both and gold.is_Symbol != answer.is_Symbol:
        return sympy.simplify(gold - answer) == 0  # math-verify compares a symbol by its name
    if gold.is_number and answer.is_number and not gold.has(sympy.I):
        # Far apart is different; near is for the exact comparison to say.
        difference = abs((gold - answer).evalf(_DIGIT_LIMIT, maxn=100))
        if difference.is_Float and difference > abs(gold.evalf(_DIGIT_LIMIT)) * 1e-9 + 1e-12:
            return False
    return verify(gold, answer, timeout_seconds=None, raise_on_error=True)


def _close(gold: Any, answer: Any, tolerance: float) -> bool:
    left, right = gold.evalf(_DIGIT_LIMIT), answer.evalf(_DIGIT_LIMIT)
    return bool(left.is_Float and right.is_Float and abs(left - right) <= tolerance * abs(left))


def _verdict(equal: bool) -> Comparison:
    return Comparison(
        Outcome.CORRECT if equal else Outcome.INCORRECT, "equal" if equal else "not equal"
    )
