r"""One spelling for the many that an answer is written in: signs, layout, boxes, spaces.

Text in, text out; nothing is read as mathematics yet. All patterns are ASCII: digits and letters of
other scripts stay what they are, and are then not read.
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "−": "-",  # the minus sign of unicode, and dashes that stand for it
    "–": "-",
    "—": "-",
    "×": r"\times ",
    "⋅": r"\cdot ",
    "·": r"\cdot ",
    "÷": "/",
    "∕": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"^{\circ}",
    "º": r"^{\circ}",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∈": r"\in ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "ℝ": r"\mathbb{R}",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "…": r"\ldots ",
    "’": "'",
    "％": "%",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}",
    "⅙": r"\frac{1}{6}",
    "⅛": r"\frac{1}{8}",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
    "\u200b": "",  # zero-width characters that change nothing of what is read
    "\u2060": "",
    "\ufeff": "",
}
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+|[A-Za-z]))")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}

_LAYOUT = re.compile(
    r"(?<!\\)\\(?:(?:left|right|bigg?|Bigg?|displaystyle|textstyle|q?quad|limits|strut)(?![A-Za-z])"
    r"|[,;: ()\[\]])"
)
_BACKSPACE = re.compile(r"(?<!\\)\\!\s*")
_CURRENCY = re.compile(r"(?<!\\)\\\$|\$|€|£|¥|\\(?:pounds|euro)(?![A-Za-z])")
_SIZED_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ROMAN = re.compile(
    r"\\(?:textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|rm|bf)\b"
)
_SET_NAME = re.compile(r"\\(?:text|mathbb|mathbf|Bbb)\s*\{?\s*R\s*\}?(?![A-Za-z])")
_SYNONYMS = {
    r"\\leqslant|\\leq|\\le": r"\\le",
    r"\\geqslant|\\geq|\\ge": r"\\ge",
    r"\\lt": "<",
    r"\\gt": ">",
    r"\\ne": r"\\neq",
    r"\\degree": r"^{\\circ}",
    r"\\varnothing": r"\\emptyset",
    r"\\lbrace": r"\\{",
    r"\\rbrace": r"\\}",
    r"\\lbrack": "[",
    r"\\rbrack": "]",
    r"\\approx|\\simeq": "=",
    r"\\div": "/",
    r"\\colon": ":",
}
_SYNONYM = [(re.compile(rf"(?:{old})(?![A-Za-z])"), new) for old, new in _SYNONYMS.items()]
_GEOMETRY = re.compile(r"\\(?:triangle|angle|square)(?![A-Za-z])|\\overline\s*\{([A-Z]+)\}")
_CIRCLE = re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})")
_SPACE = re.compile(r"\s+")
_GROUPED_BY_SPACE = re.compile(r"(?<![0-9.])[0-9]{1,3}(?: [0-9]{3})+(?![0-9 ])")
_GROUPED_BY_COMMA = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])")
_POWER_OF_TEN = re.compile(r"(?<=[0-9])[eE]([+-]?[0-9]{1,3})(?![0-9.A-Za-z])")
_MIXED_NUMBER = re.compile(r"(?<![0-9.^_/])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9.])")
_TEXT = re.compile(r"\\text\s*\{([^{}\\]*)\}")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


def hidden_character(text: str) -> str | None:
    """Returns the name of the first control, formatting or surrogate character; None if none.

    Those that `clean` takes away, since they change nothing of what is read, do not count.
    """
    for char in text:
        harmless = char in "\n\t\r" or _SIGNS.get(char) == ""
        if unicodedata.category(char) in {"Cc", "Cf", "Cs"} and not harmless:
            return f"U+{ord(char):04X}"
    return None


def clean(latex: str) -> str:
    """Returns the answer without layout, with signs, boxes and numbers spelt in one way."""
    latex = _clean_signs(latex.translate(_FULL_WIDTH))
    latex = _clean_commands(latex)
    latex = _LAYOUT.sub(" ", _BACKSPACE.sub("", latex))
    latex = _SPACE.sub(" ", _CURRENCY.sub(" ", latex)).strip(" ").removeprefix("=")
    latex = latex.strip(" ").removesuffix(".").removesuffix(",").strip(" ").strip("*`").strip(" ")
    latex = _GROUPED_BY_SPACE.sub(lambda match: match[0].replace(" ", ""), latex)
    latex = _GROUPED_BY_COMMA.sub(_join_digits, latex)
    latex = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", latex)
    return _POWER_OF_TEN.sub(r" \\times 10^{\1}", latex)


def as_text(latex: str) -> str:
    r"""Returns a cleaned answer as text: `\text{}` unwrapped, spaces inside words only."""
    return _LOOSE_SPACE.sub("", _TEXT.sub(r" \1 ", latex)).strip()


def _join_digits(match: re.Match[str]) -> str:
    """Joins `1,000`, but not inside brackets, where a comma parts members."""
    before = match.string[: match.start()]
    inside = sum(map(before.count, "([")) + before.count(r"\{") - sum(map(before.count, ")]"))
    if inside - before.count(r"\}") > 0 and "{,}" not in match[0]:
        return match[0]
    return re.sub("[^0-9]", "", match[0])


def _clean_signs(latex: str) -> str:
    latex = _SIGN.sub(lambda match: _SIGNS[match[0]], latex)
    latex = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_RAISED)}}}", latex)
    latex = _SUBSCRIPT.sub(lambda match: f"_{{{match[0].translate(_LOWERED)}}}", latex)
    return _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}", latex)


def _clean_commands(latex: str) -> str:
    latex = _SIZED_FRACTION.sub(r"\\frac", _BOX.sub("{", latex))
    latex = _ROMAN.sub(r"\\text", _SET_NAME.sub(r"\\mathbb{R}", latex))
    for pattern, spelling in _SYNONYM:
        latex = pattern.sub(spelling, latex)
    latex = _GEOMETRY.sub(lambda match: match[1] or "", latex)
    return _CIRCLE.sub(r"^{\\circ}", latex)
