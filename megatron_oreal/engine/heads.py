"""The heads as the engine runs them: log-probabilities under an objective, and token scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_oreal.engine.megatron_model import HeadResult
from megatron_oreal.engine.micro_batch import MicroBatch, ScorePosition
from megatron_oreal.models.build import PackedGPT
from megatron_oreal.models.heads import Objective, vocab_logprobs, vocab_shard
from megatron_oreal.parallel.topology import Topology

SequenceObjective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(mean scores [n], rewards [n]) -> loss [n]`, divided by the global number of sequences."""


@dataclass(frozen=True)
class LogprobHead:
    """Log-probability and entropy of every response token; differentiates `objective` if given."""

    module: PackedGPT
    topology: Topology
    vocab: int
    chunk_tokens: int
    objective: Objective | None = None
    names: tuple[str, ...] = ("logprobs", "entropy")
    score_position: ScorePosition = "before"

    def __call__(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> HeadResult:
        """Collective over the tensor-parallel group."""
        weight = self.module.output_weight()
        out = vocab_logprobs(
            self.module.gathered_hidden(hidden)[micro_batch.positions],
            weight,
            micro_batch.targets,
            vocab_shard(len(weight), self.vocab, self.topology.tp_group),
            chunk_tokens=self.chunk_tokens,
            objective=self.objective,
            fields=micro_batch.fields,
        )
        return HeadResult(out.loss, {"logprobs": out.logprobs, "entropy": out.entropy})


@dataclass(frozen=True)
class TokenScoreHead:
    """The score of every response token; `objective` trains their mean in each trajectory."""

    module: PackedGPT
    score_position: ScorePosition
    objective: SequenceObjective | None = None
    names: tuple[str, ...] = ("scores",)

    def __call__(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> HeadResult:
        """Collective over the tensor-parallel group under sequence parallelism."""
        scores = self.module.output_layer(hidden)[micro_batch.positions]
        if self.objective is None:
            return HeadResult(scores.new_zeros(()), {"scores": scores})
        means = mean_by_sequence(scores, micro_batch.sequence, len(micro_batch.rewards))
        loss = self.objective(means, micro_batch.rewards).sum()
        # The scores stay in the graph: a micro-batch without trajectories has a backward pass too.
        return HeadResult(loss + 0.0 * scores.sum(), {"scores": scores.detach()})


def mean_by_sequence(values: torch.Tensor, sequence: torch.Tensor, sequences: int) -> torch.Tensor:
    """Means of `values [n]` over the tokens of each sequence, `[sequences]`."""
    ones = torch.ones_like(values)
    count = values.new_zeros(sequences).index_add(0, sequence, ones)
    return values.new_zeros(sequences).index_add(0, sequence, values) / count
