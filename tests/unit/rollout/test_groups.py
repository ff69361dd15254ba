from __future__ import annotations

from megatron_oreal.rollout.groups import build_requests
from megatron_oreal.rollout.seeds import sample_seed
from megatron_oreal.types import Prompt


def prompt(name: str, *tokens: int) -> Prompt:
    return Prompt(id=name, question="", gold_answer="", tokens=tokens)


def test_requests_stand_prompt_by_prompt_each_with_its_own_seed():
    requests = build_requests([prompt("a", 1, 2), prompt("b", 3)], 2, seed=5, iteration=9)
    assert [request.tokens for request in requests] == [(1, 2), (1, 2), (3,), (3,)]
    assert [request.seed for request in requests] == [
        sample_seed(5, 9, name, sample) for name in "ab" for sample in range(2)
    ]


def test_a_prompt_that_occurs_again_draws_fresh_samples():
    again = build_requests([prompt("a", 1), prompt("b", 2), prompt("a", 1)], 2, seed=0, iteration=0)
    assert len({request.seed for request in again}) == 6
    assert [request.seed for request in again[4:]] == [sample_seed(0, 0, "a", s) for s in (2, 3)]
