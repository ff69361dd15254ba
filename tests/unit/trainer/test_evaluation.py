from __future__ import annotations

import pytest

from megatron_oreal.trainer.evaluation import summarise
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Verdict

OUTCOMES = {"+": Outcome.CORRECT, "-": Outcome.INCORRECT, "?": Outcome.UNVERIFIED}


def group(outcomes: str, lengths: list[int], cut: int = 0) -> RolloutGroup:
    """Returns judged samples; the first `cut` of them did not stop."""
    return RolloutGroup(
        Prompt("q", "", "", (1,)),
        tuple(Rollout((7,) * n, (0.0,) * n, "", i >= cut) for i, n in enumerate(lengths)),
        tuple(Verdict(OUTCOMES[sign], "rule", "", None, 0.0) for sign in outcomes),
    )


HARD = group("--+?", [1, 2, 3, 6], cut=2)
EASY = group("++++", [4, 4, 2, 2])


def test_rates_are_means_over_questions():
    result = summarise([HARD, EASY], (4, 1, 2), greedy=0.5, seconds=12.0)
    # One of four is right: two drawn of the four miss it in 3 of 6 ways, four drawn never do.
    assert result.pass_at == {1: (0.25 + 1) / 2, 2: (0.5 + 1) / 2, 4: 1.0}
    assert (result.questions, result.samples_per_question) == (2, 4)
    assert result.greedy == 0.5


def test_lengths_cuts_and_the_undecided_are_counted_over_responses():
    result = summarise([HARD, EASY], (1,), greedy=None, seconds=12.0)
    assert result.truncated_share == 2 / 8
    assert result.unverified_share == 1 / 8
    assert result.response_length_mean == 24 / 8
    assert result.tokens_per_s == 24 / 12


def test_metrics_are_flat_and_leave_out_what_was_not_asked():
    with_greedy = summarise([EASY], (1, 2), greedy=0.5, seconds=1.0).metrics()
    without = summarise([EASY], (1, 2), greedy=None, seconds=1.0).metrics()
    assert with_greedy["eval/pass_at_1"] == with_greedy["eval/pass_at_2"] == 1.0
    assert with_greedy.keys() - without.keys() == {"eval/greedy"}


def test_more_answers_than_samples_cannot_be_asked_for():
    with pytest.raises(ValueError, match="8"):
        summarise([EASY], (8,), greedy=None, seconds=1.0)
