"""Equivalence on answers that a person can check; none is slow enough to need the sandbox."""

from __future__ import annotations

import pytest

from megatron_oreal.types import Outcome
from megatron_oreal.verify.equivalence import compare
from megatron_oreal.verify.protocol import Pair
from megatron_oreal.verify.spelling import as_text, clean

HALF = r"\frac{1}{2}"
MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"

EQUAL = [
    ("42", "42"),
    ("42", "+42"),
    ("42", "042"),
    ("42", "42."),
    ("42", "42.0"),
    ("42", " 42 "),
    ("42", "$42$"),
    ("42", r"\(42\)"),
    ("42", r"\$42"),
    ("42", r"\text{42}"),
    ("42", "x = 42"),
    ("42", "40+2"),
    ("42", r"6 \times 7"),
    ("42", "6×7"),
    ("42", r"6\cdot 7"),
    ("42", "84/2"),
    ("42", "4.2e1"),
    ("42", r"4.2 \times 10^{1}"),
    ("42", r"42\text{ apples}"),
    ("42", "42 cm"),
    ("42", r"\boxed{42}"),
    ("-42", "−42"),
    ("-3", "(-3)"),
    ("0", "-0"),
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("1000", "1 000"),
    ("1000", r"1\,000"),
    ("1234567", "1,234,567.00"),
    (HALF, "1/2"),
    (HALF, r"\frac12"),
    (HALF, r"\dfrac{1}{2}"),
    (HALF, r"\tfrac{2}{4}"),
    (HALF, "0.5"),
    (HALF, ".5"),
    (HALF, r"50\%"),
    (r"\frac{7}{2}", r"3\frac{1}{2}"),
    (r"\frac{7}{2}", "3 1/2"),
    (r"\pi", "π"),
    (r"\sqrt{2}", r"\sqrt2"),
    (r"\sqrt{2}", "2^{1/2}"),
    (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("2^{10}", "1024"),
    ("x^2+1", "1+x^2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x^2+1", "f(x) = x^2+1"),
    ("3+4i", "4i+3"),
    ("(1,2)", r"\left(1, 2\right)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", "2, 1"),
    (r"\pm 7", "7, -7"),
    ("[0,1)", r"\left[0, 1\right)"),
    (r"(-\infty, 3]", "(-∞,3]"),
    ("x<3", "3>x"),
    (MATRIX, r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"90^\circ", "90"),
    ("90", "90°"),
    ("Monday", r"\text{ monday }"),
    (r"\text{New York}", "new  york"),
    ("True", r"\text{true}"),
    ("B", "(B)"),
    ("B", r"\text{(B)}"),
]
DIFFERENT = [
    ("42", "43"),
    ("42", "-42"),
    ("42", "42.1"),
    ("42", "42.0000001"),
    ("42", "4 2"),
    ("6", "4 2"),
    ("25", r"12 \quad 13"),
    ("2", "3 1/2"),
    ("42", "x=41"),
    ("42", "42 or 43"),
    ("42", "41, 42"),
    ("5", "½"),
    ("42", "42!"),
    ("42", "42+"),
    ("42", "42)("),
    ("42", "x"),
    ("5", "5x"),
    ("5", r"\frac{5}{0}"),
    ("5", r"\infty"),
    ("7", r"\pm 7"),
    ("1000", "1,0000"),
    (HALF, r"\frac{1}{3}"),
    (HALF, r"-\frac{1}{2}"),
    (r"\frac{1}{3}", "0.33"),
    (r"\sqrt{2}", "1.414"),
    (r"\pi", "3.14"),
    (r"\log 2", r"\ln 3"),
    ("x^2+1", "x^2-1"),
    ("x^2+1", "y^2+1"),
    ("3+4i", "3-4i"),
    ("(1,2)", "(2,1)"),
    ("1,2", "1"),
    ("[0,1)", "[0,1]"),
    ("x<3", r"x \le 3"),
    (MATRIX, r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    ("Monday", "Tuesday"),
    ("dog", "god"),
    ("B", "C"),
    ("12:30", "12:31"),
]
UNDECIDED = [
    ("5", "__import__('os').system('true')"),
    ("5", r"\input{/etc/passwd}"),
    ("5", "\x00"),
    ("5", "\u202e5"),
    ("Monday", "the 1st day"),
    (r"\frac{", "5"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold: str, answer: str) -> None:
    assert compare(Pair(gold, answer)).outcome is Outcome.CORRECT


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold: str, answer: str) -> None:
    assert compare(Pair(gold, answer)).outcome is Outcome.INCORRECT


@pytest.mark.parametrize(("gold", "answer"), UNDECIDED)
def test_undecided(gold: str, answer: str) -> None:
    comparison = compare(Pair(gold, answer))
    assert comparison.outcome is Outcome.UNVERIFIED
    assert comparison.reason


def test_brackets_do_not_make_an_answer_malformed() -> None:
    deep = "(" * 8 + "5" + ")" * 8
    assert compare(Pair("5", deep)).outcome is Outcome.CORRECT


def test_row_breaks_survive_the_cleaning() -> None:
    assert clean(r"1 \, 2 \\ 3 \; 4") == r"1 2 \\ 3 4"


def test_spaces_that_part_words_or_digits_survive_as_text() -> None:
    assert as_text("4 2") == "4 2"
    assert as_text("( 4 , 2 )") == "(4,2)"
