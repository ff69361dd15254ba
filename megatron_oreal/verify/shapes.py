"""Compares answers by their outer shape, and hands what stands inside to a scalar comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import Comparison
from megatron_oreal.verify.spelling import as_text
from megatron_oreal.verify.structure import MAX_PARTS, Shape, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Scalars = Callable[[str, str], Comparison]

_MAX_NESTING = 4
_WITHOUT_ORDER = {"set", "list", "union"}
_REALS = (r"\mathbb{R}", r"(-\infty,\infty)")
_EQUAL = Comparison(Outcome.CORRECT, "equal")


def compare_shapes(gold: str, answer: str, scalars: Scalars, nesting: int = 0) -> Comparison:
    """Compares two cleaned answers, part by part where they have parts."""
    if nesting > _MAX_NESTING:
        return Comparison(Outcome.UNVERIFIED, "lists nested too deep")
    left, right = shape_of(_real_line(gold)), shape_of(_real_line(answer))
    if left.name and right.name and as_text(left.name) != as_text(right.name):
        # y = 2x + 1 may be spelt x = (y - 1)/2
        both = left.kind == right.kind == "scalar"
        return scalars(gold, answer) if both else _different("of another variable")
    if left.kind == right.kind == "scalar":
        return _scalar(left, right, gold, answer, scalars)
    return _compare_parts(
        scalars, left, right, lambda g, a: compare_shapes(g, a, scalars, nesting + 1)
    )


def _compare_parts(scalars: Scalars, left: Shape, right: Shape, inner: Scalars) -> Comparison:
    """Compares two answers of which at least one has parts."""
    if max(len(left.parts), len(right.parts)) > MAX_PARTS:
        return Comparison(Outcome.UNVERIFIED, f"more than {MAX_PARTS} parts")
    if "union" in (left.kind, right.kind) and "bracketed" in (left.kind, right.kind):
        return scalars(_as_set(left), _as_set(right))  # sympy joins what touches
    if left.kind in _WITHOUT_ORDER and right.kind in _WITHOUT_ORDER:
        return _without_order(left.parts, right.parts, inner)
    if _single(left) != _single(right):
        return _one_against_many(left, right, inner)
    if {left.kind, right.kind} <= {"bracketed", "list", "matrix"}:
        return _in_order(left, right, inner)
    return _different("another kind of answer")


def _scalar(left: Shape, right: Shape, gold: str, answer: str, scalars: Scalars) -> Comparison:
    """Compares values; an equation that is not an assignment keeps its two sides."""
    if left.name or right.name:
        bare = scalars(left.parts[0], right.parts[0])
        if bare.outcome is Outcome.CORRECT or "=" not in gold or "=" not in answer:
            return bare
    return scalars(
        gold if "=" in answer else left.parts[0], answer if "=" in gold else right.parts[0]
    )


def _single(shape: Shape) -> bool:
    return shape.kind == "scalar"


def _one_against_many(left: Shape, right: Shape, inner: Scalars) -> Comparison:
    """Compares one value with a list: the same only where the list is one value in braces."""
    many = right if _single(left) else left
    if many.kind == "set" and len(many.parts) == 1:
        one = left.parts[0] if _single(left) else right.parts[0]
        return inner(many.parts[0], one) if many is left else inner(one, many.parts[0])
    empty = many.kind == "set" and not many.parts
    if empty and r"\emptyset" in (left.parts + right.parts):
        return _EQUAL
    odd = (left if _single(left) else right).parts[0]
    if any(sign in odd for sign in ("\\", "=", "<", ">", "|")) and not odd.startswith("\\frac"):
        return Comparison(
            Outcome.UNVERIFIED, "one of them has parts, the other cannot be taken apart"
        )
    return _different("one value against several")


def _in_order(left: Shape, right: Shape, inner: Scalars) -> Comparison:
    if len(left.parts) != len(right.parts):
        return _different("another number of parts")
    if left.kind == right.kind == "matrix" and left.columns != right.columns:
        return _different("another number of columns")
    brackets = {left.brackets, right.brackets} - {""}
    pair = len(left.parts) == 2  # noqa: PLR2004 - of more parts no brackets make an interval
    if len(brackets) > 1 and (pair or brackets & {"[)", "(]"}):
        return _different("other brackets")
    return _all(inner(g, a) for g, a in zip(left.parts, right.parts, strict=True))


def _without_order(gold: Sequence[str], answer: Sequence[str], inner: Scalars) -> Comparison:
    """Compares as sets: each part has a partner on the other side; a repeated part counts once."""
    doubtful = None
    for parts, others, turned in ((gold, answer, False), (answer, gold, True)):
        for part in parts:
            found = [inner(o, part) if turned else inner(part, o) for o in _likely(part, others)]
            if any(one.outcome is Outcome.CORRECT for one in found):
                continue
            unsure = next((one for one in found if one.outcome is Outcome.UNVERIFIED), None)
            if unsure is None:
                return _different("a part without its like")
            doubtful = doubtful or unsure
    return doubtful or _EQUAL


def _likely(part: str, others: Sequence[str]) -> Sequence[str]:
    """Returns the partners to try: the same text alone, where it is there."""
    same = [other for other in others if as_text(other) == as_text(part)]
    return same or others


def _all(comparisons: Iterable[Comparison]) -> Comparison:
    unsure = None
    for one in comparisons:
        if one.outcome is Outcome.INCORRECT:
            return one
        if one.outcome is Outcome.UNVERIFIED:
            unsure = unsure or one
    return unsure or _EQUAL


def _as_set(shape: Shape) -> str:
    if shape.kind == "union":
        return r"\cup ".join(shape.parts)
    return f"{shape.brackets[0]}{', '.join(shape.parts)}{shape.brackets[1]}"


def _real_line(text: str) -> str:
    return text.replace(*_REALS) if text.strip() == _REALS[0] else text


def _different(reason: str) -> Comparison:
    return Comparison(Outcome.INCORRECT, reason)
