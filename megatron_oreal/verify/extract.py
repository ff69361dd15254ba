"""Finds the answer of a response: the last balanced box after the last thinking-end marker.

Pure, and linear in the length of the response.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# An escape is one token of two characters: neither `\{` nor the `\\` of `\\boxed{` opens anything.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


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
    content = None
    opened: list[int | None] = []  # where the content of a box starts; None for a plain brace
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None:
                content = (start, token.start())
    return None if content is None else text[slice(*content)].strip()


def extract_answer(response: str, thinking_end_markers: Sequence[str]) -> str | None:
    """Returns the answer that a response gives, or None; lone surrogates become question marks."""
    answer = last_boxed(text_to_judge(response, thinking_end_markers))
    return None if answer is None else answer.encode("utf-8", "replace").decode("utf-8")
