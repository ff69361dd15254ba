from __future__ import annotations

import pytest

from megatron_oreal.data.rejection import Chosen, balance_lengths, choose, even_steps, length_bin
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Verdict

OUTCOMES = {"+": Outcome.CORRECT, "-": Outcome.INCORRECT, "?": Outcome.UNVERIFIED}


def group(*responses: tuple[str, str, int]) -> RolloutGroup:
    """Takes outcome, text and length of each; one of length 0 is cut."""
    return RolloutGroup(
        Prompt("q", "1+1", "2", (1,)),
        tuple(Rollout((7,) * n, (0.0,) * n, text, n > 0) for _, text, n in responses),
        tuple(Verdict(OUTCOMES[sign], "rule", "", None, 0.0) for sign, _, _ in responses),
    )


def chosen(*tokens_and_rank: tuple[int, int]) -> list[Chosen]:
    return [Chosen(f"q{i}", "", f"r{i}", n, rank) for i, (n, rank) in enumerate(tokens_and_rank)]


def test_correct_different_and_whole_ones_are_chosen_by_length() -> None:
    found = choose(
        group(
            ("+", "long one", 9),
            ("-", "wrong", 3),
            ("?", "unread", 4),
            ("+", "cut", 0),
            ("+", "short", 2),
            ("+", "$short$.", 4),
            ("+", "  ", 1),
        ),
        most=4,
    )
    assert [(one.response, one.tokens, one.rank) for one in found] == [
        ("short", 2, 0),
        ("long one", 9, 1),
    ]
    assert not choose(group(("-", "wrong", 3)), most=4)


def test_too_many_are_taken_at_even_steps() -> None:
    assert even_steps(3, 4) == [0, 1, 2]
    assert even_steps(7, 3) == [0, 3, 6]
    assert even_steps(16, 4) == [0, 5, 10, 15]
    assert even_steps(5, 1) == [2]
    found = choose(group(*(("+", f"answer {n}", n) for n in (5, 3, 1, 2, 4))), most=3)
    assert [one.tokens for one in found] == [1, 3, 5]


def test_lengths_are_counted_by_powers_of_two() -> None:
    assert [length_bin(n) for n in (1, 2, 3, 4, 7, 8, 1024)] == [0, 1, 1, 2, 2, 3, 10]


def test_an_overfull_length_loses_second_responses_first() -> None:
    # Bins of 4, 1 and 1: the median is 1, twice that stays.
    found = chosen((4, 0), (5, 1), (6, 0), (7, 2), (8, 1), (16, 3))
    kept = balance_lengths(found, 2.0, seed=0)
    assert [one.tokens for one in kept] == [4, 6, 8, 16]
    assert balance_lengths(found, 4.0, seed=0) == found
    assert balance_lengths([], 2.0, seed=0) == []


@pytest.mark.parametrize("seed", range(3))
def test_of_equals_a_seeded_draw_decides(seed: int) -> None:
    found = chosen(*[(4, 0)] * 9, (8, 0), (16, 0))
    kept = balance_lengths(found, 3.0, seed=seed)
    assert len(kept) == 3 + 2
    assert kept == balance_lengths(found, 3.0, seed=seed)
