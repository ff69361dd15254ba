r"""The outer shape of an answer: which brackets, which parts, which relation; no mathematics.

`[1, 2)` is a bracketed list of two parts, `1, 2` a bare one, `\{1, 2\}` a set, `A \cup B` a union,
`x \ge 3` an interval of x. The parts stay text. What has no such shape is one scalar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["scalar", "list", "bracketed", "set", "union", "matrix"]

MAX_PARTS = 64

_TOKEN = re.compile(r"\\\\|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = {"(": "(", "[": "[", "{": "{", r"\{": "{", r"\langle": "(", r"\begin": "begin"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\end"}
_WRAPPED = re.compile(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)", re.DOTALL)
_BRACKETS = {r"\langle": "(", r"\rangle": ")"}
_MATRIX = re.compile(
    r"\\begin\s*\{([pb]?(?:small)?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\s*\{\1\}", re.DOTALL
)
_AND = re.compile(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))")
_NAME = r"(?:[A-Za-z]|\\[a-zA-Z]+)(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?'?"
_VARIABLE = re.compile(_NAME)
_LEFT_OF_EQUALS = re.compile(
    rf"(?:{_NAME}|[A-Za-z]\s*\(\s*{_NAME}\s*\)|[a-z]{{2,}}|\\text\{{[^{{}}]*\}}"
    r"|\\angle ?[A-Z]{1,3}|\|?[A-Z]{2}\|?|\\overline\{[A-Z]{2}\})"
)
_MEMBER = re.compile(rf"{_NAME}\s*\\in(?![A-Za-z])(.*)", re.DOTALL)
_BUILT = re.compile(rf"\\\{{\s*{_NAME}(?:\s*\\in[^|:]*?)?\s*(?:\\mid|\||:)(.*)\\\}}", re.DOTALL)
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")


@dataclass(frozen=True, slots=True)
class Shape:
    """An answer's kind, its brackets where it has some, and its parts as text.

    `name` is what stands left of `=`, or the variable of an inequality; `columns` those of a
    matrix, whose parts are its cells row by row.
    """

    kind: Kind
    parts: tuple[str, ...]
    brackets: str = ""
    name: str = ""
    columns: int = 0


def shape_of(text: str) -> Shape:
    """Returns the shape of a cleaned answer."""
    text = _unwrap(_AND.sub(",", text).strip())
    named, body = assigned(text)
    member = _BUILT.fullmatch(body) or _MEMBER.fullmatch(body)
    body = member[1].strip() if member else body
    shape = _matrix(body) or _list(body) or _union(body) or _wrapped(body) or _interval(body)
    shape = shape or Shape("scalar", (body,))
    return Shape(shape.kind, shape.parts, shape.brackets, named or shape.name, shape.columns)


def assigned(text: str) -> tuple[str, str]:
    """Splits `x = 3` into name and value; the name is empty where this is no assignment."""
    sides = split_at(text, "=")
    if len(sides) > 1 and len(split_at(text, ",")) == 1 and _LEFT_OF_EQUALS.fullmatch(sides[0]):
        return sides[0], sides[-1]
    return "", text


def split_at(text: str, *separators: str) -> list[str]:
    """Splits at separators that stand in no bracket; parts are stripped."""
    parts, start, depth = [], 0, 0
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word in _OPEN:
            depth += 1
        elif word in _CLOSE:
            depth -= 1
        elif depth == 0 and word in separators:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def depth_of(text: str) -> int:
    """Returns how deep the brackets of a text go; of all kinds, balanced or not."""
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        if token[0] in _OPEN:
            depth += 1
            deepest = max(deepest, depth)
        elif token[0] in _CLOSE:
            depth -= 1
    return deepest


def _unwrap(text: str) -> str:
    """Takes off braces that hold the whole text."""
    while text.startswith("{") and text.endswith("}") and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens a text is closed by its last token."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth == 0:
            return token.end() == len(text)
    return False


def _matrix(text: str) -> Shape | None:
    match = _MATRIX.fullmatch(text)
    if not match or r"\begin" in match[2]:
        return None
    rows = [row for row in split_at(match[2].replace(r"\hline", ""), r"\\") if row]
    cells = [split_at(row, "&") for row in rows]
    if not cells or any(len(row) != len(cells[0]) for row in cells):
        return None
    return Shape("matrix", tuple(cell for row in cells for cell in row), columns=len(cells[0]))


def _list(text: str) -> Shape | None:
    parts = split_at(text, ",", ";")
    if len(parts) == 1 and r"\pm" in text:
        first = text.replace(r"\pm", "+").replace(r"\mp", "-").removeprefix("+")
        parts = [first, text.replace(r"\pm", "-").replace(r"\mp", "+")]
    return Shape("list", tuple(parts)) if len(parts) > 1 else None


def _union(text: str) -> Shape | None:
    parts = split_at(text, r"\cup")
    return Shape("union", tuple(parts)) if len(parts) > 1 else None


def _wrapped(text: str) -> Shape | None:
    match = _WRAPPED.fullmatch(text)
    if not match or not _closes_at_end(text):
        return None
    left, inner, right = _BRACKETS.get(match[1], match[1]), match[2], match[3]
    right = _BRACKETS.get(right, right)
    parts = tuple(split_at(inner, ",", ";"))
    if left == r"\{" and right == r"\}":
        if r"\mid" in inner or "|" in inner or ":" in inner:
            return None
        return Shape("set", parts if inner.strip() else ())
    if len(parts) > 1 and r"\}" not in right and left != r"\{":
        return Shape("bracketed", parts, left + right)
    return None


def _interval(text: str) -> Shape | None:
    r"""Reads `x < 3`, `3 \le x` and `1 < x \le 2` as intervals of x."""
    signs = [match[0] for match in _RELATION.finditer(text)]
    sides = split_at(text, "<", ">", r"\le", r"\ge")
    if len(sides) != len(signs) + 1 or not 1 <= len(signs) <= 2:  # noqa: PLR2004 - a chain of two
        return None
    if signs[0] in {">", r"\ge"}:  # read from the right
        sides, signs = sides[::-1], [_TURNED[sign] for sign in reversed(signs)]
    if any(sign in {">", r"\ge"} for sign in signs):
        return None
    if len(signs) == 1:
        at = next((i for i, side in enumerate(sides) if _VARIABLE.fullmatch(side)), None)
        if at is None:
            return None
        sides = [r"-\infty", *sides] if at == 0 else [*sides, r"\infty"]
        signs = ["<", *signs] if at == 0 else [*signs, "<"]
    low, name, high = sides
    if not _VARIABLE.fullmatch(name):
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Shape("bracketed", (low, high), brackets, name)


_TURNED = {">": "<", r"\ge": r"\le", "<": ">", r"\le": r"\ge"}
