r"""Numbers written plainly, read exactly: no floating point, no sympy.

`-3`, `0.25`, `1/3`, `3\frac{1}{2}`, `2.5 \times 10^{-3}`, `50\%`, `0.\overline{3}`, `1011_2`. A
decimal is what it says: 0.33 is 33/100.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
_MAX_EXPONENT = 400
_MAX_BASE = 36

_DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_SIGNED = r"[+-]?\s*"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGNED})(?:"
    rf"(?P<whole>[0-9]+)?\s*\\frac\s*(?:\{{\s*(?P<top>{_SIGNED}{_DECIMAL})\s*\}}|(?P<top1>[0-9]))\s*"
    rf"(?:\{{\s*(?P<under>{_SIGNED}{_DECIMAL})\s*\}}|(?P<under1>[0-9]))"
    rf"|(?P<over>{_DECIMAL})\s*/\s*(?P<below>{_DECIMAL})"
    rf"|(?P<head>[0-9]*\.[0-9]*)\\(?:overline|dot|bar)\s*\{{\s*(?P<period>[0-9]+)\s*\}}"
    rf"|(?P<digits>[0-9]+)_\{{?(?P<base>[0-9]{{1,2}})\}}?"
    rf"|(?P<decimal>{_DECIMAL})"
    r")(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?[0-9]{1,4})\s*\}|(?P<power1>[0-9])))?"
    r"\s*(?P<percent>\\?%|\\text\s*\{\s*percent\s*\}|percent)?"
)
_PARENTHESES = re.compile(r"\(([^()]*)\)")


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """A number; `percent` where the sign stands behind it, whose `value` is 50 for `50%`."""

    value: Fraction
    percent: bool = False
    decimal: bool = False
    base: int | None = None


def read_number(text: str) -> PlainNumber | None:
    """Returns the number that the whole text is, or None."""
    text = text.strip()
    inner = _PARENTHESES.fullmatch(text)
    match = _NUMBER.fullmatch(inner[1].strip() if inner else text)
    if match is None or len(text) > MAX_DIGITS:
        return None
    value = _value(match)
    power = int(match["power"] or match["power1"] or 0)
    if value is None or abs(power) > _MAX_EXPONENT:
        return None
    value *= Fraction(10) ** power
    base = int(match["base"]) if match["base"] else None
    decimal = "." in text and not match["period"]
    return PlainNumber(
        -value if "-" in match["sign"] else value, bool(match["percent"]), decimal, base
    )


def same_number(gold: PlainNumber, answer: PlainNumber, tolerance: float) -> bool:
    """Whether two numbers are equal.

    A percent sign may be left out or added where the digits stay: `50%` is `50`, and `0.5`. Two
    numbers of which one is written as a decimal may differ by `tolerance` times the gold answer.
    """
    readings = _readings(gold, answer)
    bound = Fraction(tolerance) if gold.decimal or answer.decimal else Fraction(0)
    if gold.base and answer.base is None and _digits(gold) == answer.value:
        return True
    return any(abs(left - right) <= bound * abs(left) for left, right in readings)


def _readings(gold: PlainNumber, answer: PlainNumber) -> list[tuple[Fraction, Fraction]]:
    """Returns the pairs of values of which one must agree."""
    if gold.base and answer.base is None:
        return []
    if gold.percent == answer.percent:
        return [(gold.value, answer.value)]
    if gold.percent:
        return [(gold.value, answer.value), (gold.value / 100, answer.value)]
    as_share = (gold.value, answer.value / 100)
    return [as_share, (gold.value, answer.value)] if abs(gold.value) >= 1 else [as_share]


def _digits(number: PlainNumber) -> int:
    """Returns the digits of a number in its base, read as a decimal number."""
    rest, digits, place = int(abs(number.value)), 0, 1
    while rest and number.base:
        rest, digit = divmod(rest, number.base)
        digits, place = digits + digit * place, place * 10
    return digits


def _value(match: re.Match[str]) -> Fraction | None:
    """Returns the value without sign, power and percent; None where it has none."""
    top, under = match["top"] or match["top1"], match["under"] or match["under1"]
    if match["over"] is not None:
        top, under = match["over"], match["below"]
    if top is not None:
        below = _fraction(under)
        if below == 0:
            return None
        return _fraction(match["whole"] or "0") + _fraction(top) / below
    if match["period"]:
        head, period = match["head"], match["period"]
        shift = len(head.partition(".")[2])
        return _fraction(head) + Fraction(int(period), (10 ** len(period) - 1) * 10**shift)
    if match["base"]:
        base = int(match["base"])
        known = 1 < base <= _MAX_BASE and all(int(digit) < base for digit in match["digits"])
        return Fraction(int(match["digits"], base)) if known else None
    return _fraction(match["decimal"])


def _fraction(text: str) -> Fraction:
    text = text.replace(" ", "").rstrip(".")
    return Fraction(text if text not in {"", "."} else "0")
