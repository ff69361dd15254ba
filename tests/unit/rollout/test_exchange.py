from __future__ import annotations

import pytest

from megatron_oreal.rollout.exchange import all_gather_rollouts
from megatron_oreal.types import Rollout


def rollout(*tokens: int, text: str = "") -> Rollout:
    return Rollout(tokens=tokens, logprobs=(-0.1,) * len(tokens), text=text, stopped=True)


@pytest.mark.usefixtures("world_of_one")
def test_rollouts_come_back_unchanged_in_the_order_of_the_requests():
    first, second = rollout(1, 2, text="√2 \x00 \U0001f600"), rollout()
    assert all_gather_rollouts({1: second, 0: first}, 2) == [first, second]
    assert all_gather_rollouts({}, 0) == []


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("own", [{}, {1: rollout(1)}, {0: rollout(1), 1: rollout(1)}])
def test_a_request_without_exactly_one_rollout_is_a_bug(own):
    with pytest.raises(RuntimeError, match="1 requests"):
        all_gather_rollouts(own, 1)
