r"""Units behind a number: `5\text{ cm}`, `5 km`, `30^\circ`, `12\text{ apples}`.

A unit may be left out. Two known units of one kind are converted; two units that differ otherwise
leave the pair undecided. A letter glued to a number (`5m`) is a variable, not a unit.
"""

from __future__ import annotations

import re
from fractions import Fraction

_TABLE = {  # unit: (kind, how many of the kind's base unit)
    "length": {"m": "1", "meter": "1", "metre": "1", "km": "1000", "kilometer": "1000",
               "cm": "1/100", "centimeter": "1/100", "mm": "1/1000", "millimeter": "1/1000"},
    "imperial length": {"in": "1", "inch": "1", "inche": "1", "ft": "12", "foot": "12",
                        "feet": "12", "yd": "36", "yard": "36", "mi": "63360", "mile": "63360"},
    "mass": {"g": "1", "gram": "1", "kg": "1000", "kilogram": "1000", "mg": "1/1000",
             "ton": "1000000"},
    "imperial mass": {"lb": "1", "pound": "1"},
    "time": {"s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600",
             "hr": "3600", "hour": "3600", "day": "86400", "week": "604800"},
    "years": {"year": "12", "yr": "12", "month": "1"},
    "volume": {"L": "1", "l": "1", "liter": "1", "litre": "1", "mL": "1/1000", "ml": "1/1000",
               "milliliter": "1/1000"},
    "money": {"dollar": "100", "cent": "1", "usd": "100"},
    "speed": {"mph": "1"}, "metric speed": {"km/h": "1", "kph": "1", "km/hr": "1", "kmh": "1"},
    "plain speed": {"m/s": "1"},
    "angle": {"degree": "1", "deg": "1", "^{\\circ}": "1"},
    "force": {"N": "1"}, "energy": {"J": "1"}, "power": {"W": "1"},
}  # fmt: skip
_UNITS = {
    unit: (kind, Fraction(factor))
    for kind, factors in _TABLE.items()
    for unit, factor in factors.items()
}
_WORDS = "|".join(sorted((re.escape(u) for u in _UNITS if len(u) > 1), key=len, reverse=True))
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?"
_POWER_AGAIN = _POWER.replace("power", "power2")
_BEHIND = re.compile(
    r"(?P<body>.*(?:[0-9})%]|\\pi))\s*(?:"
    rf"\\text\s*\{{\s*(?P<text>[A-Za-z][A-Za-z ./]*?)\s*(?:\^(?P<inner>[23]))?\s*\}}{_POWER}"
    r"|(?P<circle>\^\{\\circ\})\s*(?:\\text\s*\{\s*[CF]\s*\}|[CF])?"
    rf"|(?P<plain>(?:(?:square|cubic) )?(?:{_WORDS})s?)(?![A-Za-z]){_POWER_AGAIN}"
    r"|(?<=[0-9}]) (?P<letter>[mgshLNJW])(?P<cube>\^\{?[23]\}?)?"
    r"|(?<=[0-9}]) (?P<words>[a-z]{3,}(?: [a-z]+){0,3})"
    r")",
    re.DOTALL,
)
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_CIRCLE = r"^{\circ}"
_SHORT = {"sq": "square", "cu": "cubic"}
_DIMENSIONS = {"square": 2, "cubic": 3}


def split_unit(text: str) -> tuple[str, str]:
    """Returns what stands before a unit, and the unit as `name^power`, empty where it has none."""
    match = _BEHIND.fullmatch(text)
    if match is None or _FUNCTION.search(match["body"]):
        return text, ""
    found = match.groupdict()
    name = next(found[k] for k in ("text", "circle", "plain", "letter", "words") if found[k])
    power = (
        found["power"]
        or found["power2"]
        or found["inner"]
        or re.sub("[^23]", "", found["cube"] or "")
    )
    words = [_SHORT.get(word.rstrip("."), word) for word in name.split()]
    if words[0] in _DIMENSIONS and len(words) > 1:
        power, words = str(_DIMENSIONS[words[0]]), words[1:]
    name = _singular(" ".join(words))
    body = match["body"].strip()
    if body.endswith(_CIRCLE) and name in {"c", "f"}:
        return body.removesuffix(_CIRCLE).strip(), f"degree {name}^1"
    return body, f"{name}^{power or 1}"


def ratio_of_units(gold: str, answer: str) -> Fraction | None:
    """Returns how many gold units one answer unit is; None where that is not known."""
    if not gold or not answer or gold == answer:
        return Fraction(1)
    (left, power), (right, other) = gold.rsplit("^", 1), answer.rsplit("^", 1)
    if left not in _UNITS or right not in _UNITS or power != other:
        return None
    (kind, factor), (other_kind, other_factor) = _UNITS[left], _UNITS[right]
    return (other_factor / factor) ** int(power) if kind == other_kind else None


def _singular(name: str) -> str:
    for known in (name, name.lower(), name.removesuffix("s"), name.lower().removesuffix("s")):
        if known in _UNITS:
            return known
    return name.lower().removesuffix("s")
