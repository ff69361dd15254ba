from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.rollout.seeds import sample_seed


def test_seeds_are_the_same_on_every_machine():
    assert sample_seed(0, 0, "a", 0) == 8486565526693381467
    assert sample_seed(7, 3, "question", 2) == 6895596542106801780


def test_each_part_of_the_key_counts_and_none_can_imitate_another():
    keys = [
        (0, 0, "a", 0),
        (1, 0, "a", 0),
        (0, 1, "a", 0),
        (0, 0, "b", 0),
        (0, 0, "a", 1),
        (0, 0, "a', 1", 0),
        (0, 0, "a\x000", 0),
        (-1, 0, "a", 0),
    ]
    assert len({sample_seed(*key) for key in keys}) == len(keys)


@given(st.integers(), st.integers(), st.text(), st.integers(0))
def test_seeds_fit_a_positive_int64_for_any_text(run_seed, iteration, prompt_id, sample):
    assert 0 <= sample_seed(run_seed, iteration, prompt_id, sample) < 2**63
