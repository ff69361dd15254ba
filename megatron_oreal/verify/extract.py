"""Finds the answer of a response: the last balanced box after the last thinking-end marker.

Fall-backs, where the config names them: what follows "the answer is", and the last number. Pure,
and linear in the length of the response, of which no more than the end is read.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_JUDGED_CHARS = 1 << 18
MAX_PARTS = 16

# An escape is one token of two characters: neither `\{` nor the `\\` of `\\boxed{` opens anything.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


_BETWEEN_PARTS = re.compile(r"[\s$]*(?:,|;|,?\s*(?<![a-z])(?:and|or)(?![a-z]))[\s$]*")
_ANNOUNCED = re.compile(r"answer\s{0,3}(?:is|:|=)\s{0,3}:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.\s|(?<!\\)\$[\s.]")
_NUMBER = re.compile(
    r"(?<![0-9A-Za-z.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{1,40})?%?"
)


class _Box(NamedTuple):
    """Where a box starts, where its content lies, and where it ends."""

    start: int
    content: tuple[int, int]
    end: int


def text_to_judge(response: str, thinking_end_markers: Sequence[str]) -> str:
    """Returns what follows the last of all markers; the whole response where there is none."""
    ends = [
        start + len(marker)
        for marker in thinking_end_markers
        if (start := response.rfind(marker)) >= 0
    ]
    return response[max(ends, default=0) :]


def last_boxed(text: str) -> str | None:
    r"""Returns the stripped content of the `\boxed{}` or `\fbox{}` that closes last, or None.

    Of nested boxes the outer one counts. A box that is never closed does not count, nor does it
    hide an earlier one.
    """
    boxes = _boxes(text)
    return None if not boxes else text[slice(*boxes[-1].content)].strip()


def last_boxes(text: str) -> str | None:
    r"""Returns the last box, with those before it that belong to it, parted by commas.

    Boxes belong together where nothing but `,`, `;`, "and" or "or" stands between them:
    `\boxed{1}, \boxed{2}` is `1, 2`.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    first = len(boxes) - 1
    while (
        first
        and len(boxes) - first < MAX_PARTS
        and _BETWEEN_PARTS.fullmatch(text, boxes[first - 1].end, boxes[first].start)
    ):
        first -= 1
    return ", ".join(text[slice(*box.content)].strip() for box in boxes[first:])


def announced(text: str) -> str | None:
    """Returns the rest of the line after the last "answer is" or "answer:", or None."""
    found = deque(_ANNOUNCED.finditer(text), maxlen=1)
    if not found:
        return None
    line = text[found[0].end() :].lstrip().partition("\n")[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0].strip(" .*$`") or None


def last_number(text: str) -> str | None:
    """Returns the last number that is written in digits, or None."""
    found = deque(_NUMBER.finditer(text), maxlen=1)
    return found[0][0] if found else None


_WAYS = {"boxed": last_boxes, "announced": announced, "last_number": last_number}


def extract_answer(
    response: str, thinking_end_markers: Sequence[str], ways: Sequence[str] = ("boxed",)
) -> str | None:
    """Returns the answer that a response gives, by the first of these ways that finds one.

    Lone surrogates become question marks. Only the last `MAX_JUDGED_CHARS` are read.
    """
    text = text_to_judge(response, thinking_end_markers)[-MAX_JUDGED_CHARS:]
    answers = (_WAYS[way](text) for way in ways)
    answer = next((found for found in answers if found is not None), None)
    return None if answer is None else answer.encode("utf-8", "replace").decode("utf-8")


def _boxes(text: str) -> list[_Box]:
    """Returns the outermost balanced boxes in the order in which they close."""
    boxes: list[_Box] = []
    opened: list[tuple[int, int] | None] = []  # a box's start and its content's; None for a brace
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.span())
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None:
                while boxes and boxes[-1].start > start[0]:
                    boxes.pop()
                boxes.append(_Box(start[0], (start[1], token.start()), token.end()))
    return boxes
