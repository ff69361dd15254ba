from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.data.overlap import HeldOut, jaccard, near_duplicates, ngrams_of, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Find $x$.", ("find", "x")),
        ("find   x ?", ("find", "x")),
        (r"\(\dfrac{1}{2}\)", ("\\", "frac", "1", "2")),
        (r"$\left( 2,3 \right)$", ("(", "2", ",", "3", ")")),
        ("x_12", ("x", "_", "12")),
        ("...", ()),
    ],
)
def test_words_are_what_is_asked_not_how_it_is_typeset(text: str, words: tuple[str, ...]) -> None:
    assert words_of(text) == words


def test_ngrams() -> None:
    assert ngrams_of("abcd", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert ngrams_of("ab", 3) == {("a", "b")}
    assert ngrams_of("", 3) == {()}


def test_a_near_duplicate_is_found_from_the_threshold_on() -> None:
    # Eight and eight pairs of letters, seven of them shared: 7 / 9.
    texts = [ngrams_of(text, 2) for text in ("abcdefghi", "abcdefghz", "abcdefghi")]
    assert jaccard(texts[0], texts[1]) == 7 / 9
    assert near_duplicates(texts, "   ", 7 / 9) == {1: (0, 7 / 9), 2: (0, 1.0)}
    assert near_duplicates(texts, "   ", 0.8) == {2: (0, 1.0)}
    assert near_duplicates(texts, "xyx", 0.5) == {2: (0, 1.0)}


@given(
    st.lists(st.text("abc", min_size=1, max_size=8), max_size=12),
    st.sampled_from([0.1, 0.5, 0.7, 0.8, 1.0]),
)
def test_the_search_finds_what_comparing_all_finds(words: list[str], threshold: float) -> None:
    texts = [ngrams_of(word, 2) for word in words]
    kept: list[int] = []
    expected = {}
    for i, text in enumerate(texts):
        near = [(j, jaccard(text, texts[j])) for j in kept]
        repeated = next(((j, index) for j, index in near if index >= threshold - 1e-9), None)
        if repeated:
            expected[i] = repeated
        else:
            kept.append(i)
    assert near_duplicates(texts, [0] * len(texts), threshold) == expected


def test_the_closest_held_out_question_by_the_share_of_the_shorter() -> None:
    held_out = HeldOut([("suite 1", "a b c d e f"), ("suite 2", "p q r s")], n=3)
    assert len(held_out) == 2
    # a b c, b c d of the four runs of both.
    assert held_out.closest("a b c d x y") == ("suite 1", 0.5)
    # Both runs of the shorter one.
    assert held_out.closest("Say: p q r s, and why?") == ("suite 2", 1.0)
    assert held_out.closest("a b x c d y") == ("", 0.0)


def test_a_short_question_is_held_out_only_whole() -> None:
    held_out = HeldOut([("suite 1", "1 + 1")], n=8)
    assert held_out.closest("1 + 1?") == ("suite 1", 1.0)
    assert held_out.closest("1 + 2") == ("", 0.0)
    assert HeldOut([], n=8).closest("1 + 1") == ("", 0.0)
