"""Extraction: which text is judged, and which box of it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.verify.extract import extract_answer, last_boxed, text_to_judge

MARKERS = ("</think>", "[/THINK]")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}", "42"),
        (r"so \fbox{42}", "42"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{1}, no, \fbox{2}", "2"),
        (r"\boxed  {42}", "42"),
        ("\\boxed\n{ 42 }", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1, 2}", r"\{1, 2"),
        (r"\boxed{\boxed{42}}", r"\boxed{42}"),
        (r"\boxed{a} } { \boxed{b}", "b"),
        (r"{{{ \boxed{42}", "42"),
        (r"}}} \boxed{42}", "42"),
        (r"\boxed{1 \boxed{2}", "2"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{ }", ""),
        (r"\boxed{42\}", None),
        (r"\boxed{42", None),
        (r"\boxed 42", None),
        (r"\boxed", None),
        (r"\\boxed{42}", None),
        (r"\\\boxed{42}", "42"),
        (r"\boxedx{42}", None),
        (r"boxed{42}", None),
        ("42", None),
        ("", None),
        ("\\", None),
    ],
)
def test_the_last_balanced_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1}</think>\boxed{2}", "2"),
        (r"\boxed{1}</think>I forgot.", None),
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        (r"\boxed{1}</think>\boxed{2}[/THINK]\boxed{3}", "3"),
        (r"\boxed{1}[/THINK]\boxed{2}</think>", None),
        (r"\boxed{1</think>2}", None),
        (r"no marker: \boxed{1}", "1"),
        ("\\boxed{\ud800}", "?"),
    ],
)
def test_only_what_follows_the_last_marker_is_judged(response: str, answer: str | None) -> None:
    assert extract_answer(response, MARKERS) == answer


def test_without_markers_the_whole_response_is_judged() -> None:
    assert text_to_judge("a</think>b", ()) == "a</think>b"


@given(st.text(alphabet="\\{}boxedf 1\n"))
def test_what_is_found_is_balanced_and_was_in_a_box(text: str) -> None:
    content = last_boxed(text)
    if content is not None:
        assert content in text
        assert last_boxed(rf"\boxed{{{content}}}") == content


@given(st.text(), st.text(alphabet="0123456789+-*/^x ", min_size=1))
def test_a_box_at_the_end_is_found_whatever_stands_before(noise: str, answer: str) -> None:
    assert last_boxed(f"{noise} \\boxed{{{answer}}}") == answer.strip()


@pytest.mark.parametrize(
    "unit", ["{", "}", "\\boxed{", "\\boxed ", "\\", "\\boxed{1}", "\\fbox{\\{", "</think>"]
)
def test_a_megabyte_of_anything_takes_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    before = time.process_time()
    extract_answer(text, MARKERS)
    assert time.process_time() - before < 10.0  # a quadratic scan takes hours
