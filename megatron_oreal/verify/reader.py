r"""Reads LaTeX into sympy with the grammar of math-verify, exactly and without `eval`.

math-verify hands the text of numbers to `sympy.Number(str)`, which ends in `parse_expr` and so in
`eval`. Here a number is read by its digits into a rational, before sympy sees it. What would be
gigantic once evaluated is refused while it is still a tree.
"""

from __future__ import annotations

import math
import re
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import (
    _Latex2Sympy,  # pyright: ignore[reportPrivateUsage] - its one hook for numbers
)
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify.grader import should_treat_as_complex

from megatron_oreal.verify.structure import depth_of

MAX_DEPTH = 24
MAX_EXPRESSION_CHARS = 800
_MAX_RESULT_DIGITS = 2000.0
_MAX_FACTORIAL = 500
_MAX_BINOMIAL = 1000
_MAX_NODES = 2000
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
_DIGITS = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_LONG_NUMERAL = re.compile(r"[0-9]{200}")
_BINOMIAL = re.compile(r"\\[dt]?binom|\\choose|\\gcd|\\lcm|gcd|lcm")
_NESTED_EXPONENT = re.compile(r"\^[^+\-*/=,]*\^[^+\-*/=,]*\^")
_COMMAND = re.compile(
    r"\\(?:input|include|write|def|let|newcommand|csname|open(?:in|out)|read|catcode)\b"
)


class RefusedError(ValueError):
    """An expression that is not worth, or not safe, reading; the text says why."""


class UnreadableError(ValueError):
    """A text that is no expression of the grammar."""


class _ExactReader(_Latex2Sympy):
    """The converter of math-verify, with numbers read as rationals."""

    def parse_number(self, text: str) -> sympy.Basic:
        """Returns the number of a numeral token."""
        digits = text.replace(",", "")
        if not _DIGITS.fullmatch(digits):
            raise UnreadableError("a numeral of other characters than digits")
        return sympy.Rational(digits)


def read(latex: str) -> Any:
    """Returns the expression that a text is.

    Raises:
        RefusedError: it is too deep, too long or too large.
        UnreadableError: it is no expression.
    """
    refuse_text(latex)
    normal = normalize_latex(latex, _NORMALIZATION)
    reader = _ExactReader(is_real=not should_treat_as_complex(normal))
    try:
        tree = reader.parse(normal)
    except (RefusedError, UnreadableError, MemoryError):
        raise
    except Exception as error:  # the grammar's own are plain `Exception`s, and sympy's are many
        raise UnreadableError("it could not be read") from error
    if not isinstance(tree, sympy.Basic | sympy.MatrixBase):
        raise UnreadableError("it is more than one expression")
    refuse_tree(tree)
    return tree.subs({symbol: sympy.I for symbol in tree.free_symbols if str(symbol) == "i"})


def refuse_text(latex: str) -> None:
    """Raises RefusedError for a text whose reading alone would be expensive."""
    if len(latex) > MAX_EXPRESSION_CHARS:
        raise RefusedError(f"an expression of more than {MAX_EXPRESSION_CHARS} characters")
    if depth_of(latex) > MAX_DEPTH:
        raise RefusedError(f"brackets deeper than {MAX_DEPTH}")
    if _LONG_NUMERAL.search(latex):
        raise RefusedError("a numeral of 200 digits or more")
    if _NESTED_EXPONENT.search(latex):
        raise RefusedError("a tower of exponents")
    if _COMMAND.search(latex):
        raise RefusedError("a command of TeX")
    if _BINOMIAL.search(latex) and any(int(n) > _MAX_BINOMIAL for n in re.findall("[0-9]+", latex)):
        raise RefusedError("a large binomial")  # its value is taken while it is read


def refuse_tree(tree: sympy.Basic | sympy.MatrixBase) -> None:
    """Raises RefusedError where an unevaluated tree would evaluate to something gigantic."""
    for count, node in enumerate(sympy.preorder_traversal(tree)):
        if count > _MAX_NODES:
            raise RefusedError(f"more than {_MAX_NODES} terms")
        if isinstance(node, sympy.Pow) and node.is_number and _digits(node) > _MAX_RESULT_DIGITS:
            raise RefusedError("a power of too many digits")
        if isinstance(node, sympy.Pow) and node.exp.is_number and _digits(node.exp) > 2:  # noqa: PLR2004
            raise RefusedError("an exponent above 100")
        if isinstance(node, sympy.factorial) and _magnitude(node.args[0]) > _MAX_FACTORIAL:
            raise RefusedError(f"a factorial above {_MAX_FACTORIAL}")
        if isinstance(node, sympy.Sum | sympy.Product) and _range(node) > _MAX_BINOMIAL:
            raise RefusedError(f"a sum of more than {_MAX_BINOMIAL} terms")


def _range(node: sympy.Basic) -> float:
    return max(_magnitude(end) for limit in node.args[1:] for end in limit.args[1:])


def _magnitude(node: sympy.Basic) -> float:
    """Returns a bound of a number's absolute value; infinite where it has too many digits."""
    digits = _digits(node)
    return 10.0**digits if digits < 300 else math.inf  # noqa: PLR2004 - the range of a float


def _digits(node: sympy.Basic) -> float:
    """Returns a bound of log10 of a number's absolute value, from the tree alone."""
    if isinstance(node, sympy.Rational):
        top, under = abs(int(node.p)), int(node.q)
        return max(math.log10(top) - math.log10(under), -300.0) if top else -300.0
    if isinstance(node, sympy.Pow):
        exponent = node.args[1]
        inner = _magnitude(exponent)
        return max(abs(_digits(node.args[0])), 0.3) * inner if inner else 0.0
    if isinstance(node, sympy.Mul):
        return sum(_digits(arg) for arg in node.args)
    if isinstance(node, sympy.factorial):
        n = _magnitude(node.args[0])
        return n * math.log10(n + 1) if n < math.inf else math.inf
    return sum((max(_digits(arg), 0.0) for arg in node.args), 1.0)
