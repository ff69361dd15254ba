from __future__ import annotations

import pytest

from megatron_oreal.config.schema import SamplingConfig
from megatron_oreal.rollout.engine import Finished, Request
from megatron_oreal.rollout.pace import PacedSampler, pace_metrics
from megatron_oreal.types import Advance, Rollout, advance_nothing


class Streaming:
    """Hands out a response of as many tokens as the request's seed says."""

    def generate(
        self,
        requests: list[Request],
        sampling: SamplingConfig,
        advance: Advance,
        finished: Finished = lambda _index, _rollout: None,
    ) -> list[Rollout]:
        rollouts = [Rollout((7,) * r.seed, (-1.0,) * r.seed, "", stopped=True) for r in requests]
        for index, rollout in enumerate(rollouts):
            finished(index, rollout)
        assert sampling == SamplingConfig()
        advance(len(rollouts))
        return rollouts


def test_tokens_and_seconds_of_what_this_rank_sampled() -> None:
    told: list[int] = []
    paced = PacedSampler(Streaming())
    assert str(paced) == "responses, 0 tokens on this rank, 0/s"
    requests = [Request((1,), seed) for seed in (2, 3)]
    rollouts = paced.generate(
        requests, SamplingConfig(), advance_nothing, lambda index, _: told.append(index)
    )
    assert [len(rollout.tokens) for rollout in rollouts] == [2, 3]
    assert told == [0, 1]
    assert paced.tokens == 5
    assert paced.rate == pytest.approx(5 / paced.seconds)


def test_the_slowest_engine_against_the_median() -> None:
    assert pace_metrics([100.0, 0.0, 40.0, 120.0]) == {
        "throughput/slowest_engine_share": 0.4,
        "throughput/slowest_engine_rank": 2.0,
    }


@pytest.mark.parametrize("rates", [[], [0.0, 0.0], [80.0, 0.0]])
def test_of_one_engine_there_is_nothing_to_say(rates: list[float]) -> None:
    assert pace_metrics(rates) == {}
