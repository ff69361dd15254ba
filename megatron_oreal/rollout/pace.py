"""How fast each engine samples: a slow one keeps all others waiting."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.rollout.engine import Finished, Request, Sampler
    from megatron_oreal.types import Advance, Rollout


@dataclass
class PacedSampler:
    """Samples, and notes what came of this rank's engine and when its last response came.

    As text it is the unit of a progress bar: responses, and the tokens of this rank's.
    """

    sampler: Sampler
    tokens: int = 0
    seconds: float = 0.0

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        advance: Advance,
        finished: Finished = lambda _index, _rollout: None,
    ) -> list[Rollout]:
        """See `Sampler.generate`."""
        started = time.perf_counter()

        def take(index: int, rollout: Rollout) -> None:
            self.tokens += len(rollout.tokens)
            self.seconds = time.perf_counter() - started
            finished(index, rollout)

        return self.sampler.generate(requests, sampling, advance, take)

    @property
    def rate(self) -> float:
        """Tokens a second until this rank's last response, 0 where it had none."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        """The unit of a progress bar."""
        return f"responses, {self.tokens:,} tokens on this rank, {self.rate:,.0f}/s"


def pace_metrics(rates: Sequence[float]) -> dict[str, float]:
    """Returns how the slowest engine compares, given each rank's rate; pure.

    Ranks without a response (rate 0) are left out; of fewer than two there is nothing to say.
    """
    sampled = [rate for rate in rates if rate > 0]
    if not sampled[1:]:
        return {}
    slowest = min(sampled)
    return {
        "throughput/slowest_engine_share": slowest / median(sampled),
        "throughput/slowest_engine_rank": float(list(rates).index(slowest)),
    }
