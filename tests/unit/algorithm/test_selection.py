from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.algorithm.selection import drop_trivial, make_trajectory, pick_pairs, select
from megatron_oreal.algorithm.shaping import shape_rewards
from megatron_oreal.config.schema import OrealConfig
from megatron_oreal.types import RolloutGroup
from tests.unit.algorithm.groups import make_group

RLOO = OrealConfig()


def shaped(*outcomes: str) -> list[RolloutGroup]:
    return shape_rewards([make_group(o, prompt_id=f"q{i}") for i, o in enumerate(outcomes)], RLOO)


def test_trivial_questions_are_dropped():
    groups = shaped("++", "+-", "--", "??", "?+", "?+-", "-")
    assert [g.prompt.id for g in drop_trivial(groups)] == ["q1", "q5"]


def test_a_pair_is_one_correct_and_one_incorrect_answer():
    (group,) = shaped("-?+--")
    positive, negative = pick_pairs([group], seed=0, iteration=0)
    assert positive.tokens == (1, 2, 3, 102, 102)
    assert (positive.prompt_id, positive.prompt_length, positive.response_length) == ("q0", 3, 2)
    assert positive.rollout_logprobs == (-2.5, -2.5)
    # rewards -1, 1, -1, -1: 1 - (-3)/3 = 2 and -1 - (-1)/3 = -2/3
    assert (positive.reward, positive.advantage) == (1, 2)
    assert (negative.reward, negative.advantage) == (-1, pytest.approx(-2 / 3))
    assert negative.tokens[3] in {100, 103, 104}


def test_a_draw_does_not_change_with_the_other_groups():
    groups = shaped(*["+-" * 8] * 4)
    together = pick_pairs(groups, seed=3, iteration=7)
    alone = [pair for g in reversed(groups) for pair in pick_pairs([g], 3, 7)]
    assert sorted(together, key=str) == sorted(alone, key=str)


def test_draws_change_with_seed_iteration_and_question():
    (group,) = shaped("+-" * 32)
    draws = {pick_pairs([group], seed, iteration) for seed in range(3) for iteration in range(3)}
    other = pick_pairs([replace(group, prompt=replace(group.prompt, id="x"))], 0, 0)
    assert len(draws) == 9
    assert [t.tokens for t in other] != [t.tokens for t in pick_pairs([group], 0, 0)]


def test_every_answer_has_its_turn():
    (group,) = shaped("++--")
    drawn = [t.tokens[3] for i in range(200) for t in pick_pairs([group], 0, i)]
    # each of the four has probability 1/2: 100 of 200, standard deviation 7
    assert all(65 < drawn.count(token) < 135 for token in (100, 101, 102, 103))


def test_draws_are_alike_in_another_process():
    code = (
        "from megatron_oreal.algorithm.selection import pick_pairs\n"
        "from tests.unit.algorithm.test_selection import shaped\n"
        "print([t.tokens[3] for t in pick_pairs(shaped('+-' * 16, '+-' * 16), 5, 6)])"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    here = [t.tokens[3] for t in pick_pairs(shaped("+-" * 16, "+-" * 16), 5, 6)]
    assert run.stdout.strip() == str(here)


@pytest.mark.parametrize("prompt_id", ["", "\ud800", "a/b", "\x00", "é" * 10_000])
def test_any_id_of_a_file_can_key_a_draw(prompt_id):
    groups = shape_rewards([make_group("+-", prompt_id=prompt_id)], RLOO)
    assert [t.prompt_id for t in pick_pairs(groups, 0, 0)] == [prompt_id] * 2


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ("all_nontrivial", ["q1:1.0", "q1:-1.0", "q3:-1.0", "q3:1.0", "q3:1.0"]),
        (
            "all",
            ["q0:1.0", "q0:1.0", "q1:1.0", "q1:-1.0", "q2:-1.0", "q3:-1.0", "q3:1.0", "q3:1.0"],
        ),
    ],
)
def test_whole_groups(selection, chosen):
    groups = shaped("++", "+-", "-", "-+?+", "??")
    trajectories = select(groups, replace(RLOO, selection=selection), seed=0, iteration=0)
    assert [f"{t.prompt_id}:{t.reward}" for t in trajectories] == chosen


@given(st.lists(st.text(alphabet="+-?", min_size=1, max_size=8), max_size=6))
def test_pairs_balance_and_come_from_nontrivial_questions(outcomes):
    trajectories = select(shaped(*outcomes), RLOO, seed=1, iteration=2)
    assert [t.reward for t in trajectories] == [1, -1] * (len(trajectories) // 2)
    nontrivial = [f"q{i}" for i, o in enumerate(outcomes) if "+" in o and "-" in o]
    assert [t.prompt_id for t in trajectories[::2]] == nontrivial


def test_an_answer_without_reward_or_tokens_is_no_trajectory():
    (group,) = shaped("+?")
    with pytest.raises(ValueError, match="answer 1 of 'q0'"):
        make_trajectory(group, 1)
    (empty,) = shape_rewards([make_group("+-", lengths=[1, 0])], RLOO)
    with pytest.raises(ValueError, match="no tokens"):
        make_trajectory(empty, 1)
