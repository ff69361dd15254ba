r"""Decides whether two mathematical answers are equal.

Runs in a verification worker only: sympy may not come back.

1. Equal texts, after a light normalisation, are equal.
2. A gold answer that is a word is compared as text: math-verify reads words as products, where
   `dog` equals `god`.
3. All else is read as LaTeX by math-verify. Its reader of plain expressions is not used (it ends
   in `eval`), nor are its time limits: the sandbox has the deadline.

"Not equal" is said only of a pair that was read on both sides, or of an answer in plain arithmetic
characters that is no expression (`3+`). An answer that could not be read for another reason is
UNVERIFIED: it may be right.
"""

from __future__ import annotations

import re

from math_verify import LatexExtractionConfig, parse, verify

from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import Comparison, Pair

_LATEX_ONLY = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]

_SPELLINGS = {
    "−": "-",  # unicode minus
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"^{\circ}",
    "\u00a0": " ",
}
_SPELLING = re.compile("|".join(_SPELLINGS))
_LAYOUT = re.compile(
    r"(?<!\\)\\(?:(?:left|right|displaystyle|q?quad)(?![A-Za-z])|[,;:! $()\[\]])|\$"
)
_SIZED_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}\\]*)\}")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_SPACE = re.compile(r"\s+")
_GROUPED_DIGITS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d ])")
_POWER_OF_TEN = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})(?![\d.A-Za-z])")
_MIXED_NUMBER = re.compile(r"(?<![\d.])(\d+) (\d+) ?/ ?(\d+)(?![\d.])")
_SIDE_BY_SIDE = re.compile(r"(?<!\\frac )\d \d")  # math-verify would add the two numbers
_WORD = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
_CHOICE = re.compile(r"\(([A-Za-z])\)")
_PLAIN_ARITHMETIC = re.compile(r"[0-9+\-*/^().,= ]{0,64}")

# What sympy raises on expressions it cannot compare; anything else ends the worker, which leaves
# the pair UNVERIFIED too.
_NOT_COMPARABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def compare(pair: Pair) -> Comparison:
    """Compares an answer with the gold answer; without bounds in time and memory of its own."""
    gold, answer = clean(pair.gold), clean(pair.answer)
    if as_text(gold) == as_text(answer):
        return Comparison(Outcome.CORRECT, "same text")
    if _WORD.fullmatch(as_text(gold)):
        return _compare_words(as_text(answer))
    return _compare_mathematics(gold, answer)


def clean(latex: str) -> str:
    """Returns the answer without layout, with signs, boxes and numbers spelt in one way."""
    latex = _SPELLING.sub(lambda match: _SPELLINGS[match[0]], latex)
    latex = _SIZED_FRACTION.sub(r"\\frac", _BOX.sub("{", latex))
    latex = _SPACE.sub(" ", _LAYOUT.sub(" ", latex)).strip().removesuffix(".").strip()
    latex = _GROUPED_DIGITS.sub(lambda match: match[0].replace(" ", ""), latex)
    latex = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", latex)
    return _POWER_OF_TEN.sub(r" \\times 10^{\1}", latex)


def as_text(latex: str) -> str:
    r"""Returns a cleaned answer as text: `\text{}` unwrapped, spaces inside words only."""
    text = _LOOSE_SPACE.sub("", _TEXT.sub(r"\1", latex)).strip()
    choice = _CHOICE.fullmatch(text)
    text = choice[1] if choice else text
    return text.casefold() if _WORD.fullmatch(text) else text


def _compare_words(answer: str) -> Comparison:
    """Compares an answer that is not the same text as a gold answer that is a word."""
    if _WORD.fullmatch(answer):
        return Comparison(Outcome.INCORRECT, "another word")
    return Comparison(Outcome.UNVERIFIED, "the gold answer is a word, the answer is not")


def _compare_mathematics(gold: str, answer: str) -> Comparison:
    """Compares two answers as math-verify reads them."""
    parsed_gold, parsed_answer = _read(gold), _read(answer)
    if not parsed_gold:
        return Comparison(Outcome.UNVERIFIED, "the gold answer could not be read")
    if not parsed_answer:
        if _PLAIN_ARITHMETIC.fullmatch(answer):
            return Comparison(Outcome.INCORRECT, "not an expression")
        return Comparison(Outcome.UNVERIFIED, "the answer could not be read")
    try:
        equal = verify(parsed_gold, parsed_answer, timeout_seconds=None, raise_on_error=True)
    except _NOT_COMPARABLE as error:
        return Comparison(Outcome.UNVERIFIED, f"not comparable: {type(error).__name__}")
    if equal:
        return Comparison(Outcome.CORRECT, "equal")
    return Comparison(Outcome.INCORRECT, "not equal")


def _read(latex: str) -> list:
    """Returns what math-verify makes of an answer: one sympy expression, or nothing."""
    if _SIDE_BY_SIDE.search(latex):
        return []
    return parse(
        rf"\boxed{{{latex}}}",
        extraction_config=_LATEX_ONLY,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )
