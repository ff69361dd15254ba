"""The heads as the engine runs them: log-probabilities under an objective, and token scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megatron_oreal.config.head_chunks import most_chunk_tokens
from megatron_oreal.config.schema import Config
from megatron_oreal.engine.megatron_model import HeadResult
from megatron_oreal.engine.micro_batch import MicroBatch, ScorePosition
from megatron_oreal.models.build import PackedGPT
from megatron_oreal.models.heads import (
    HeadSettings,
    Objective,
    vocab_logprobs,
    vocab_shard,
)
from megatron_oreal.parallel.topology import Topology

SequenceObjective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(mean scores [n], rewards [n]) -> loss [n]`, divided by the global number of sequences."""


def head_settings(config: Config, words: int) -> HeadSettings:
    """Returns how a run's language-model heads compute, on ranks that have so many words."""
    engine = config.engine
    return HeadSettings(
        most_chunk_tokens(config, words), engine.head_logits_fp32, engine.head_grad_fp32
    )


@dataclass(frozen=True)
class LogprobHead:
    """Log-probability and entropy of every response token; differentiates `objective` if given."""

    module: PackedGPT
    topology: Topology
    vocab: int
    settings: HeadSettings
    objective: Objective | None = None
    names: tuple[str, ...] = ("logprobs", "entropy")
    score_position: ScorePosition = "before"

    def __call__(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> HeadResult:
        """Collective over the tensor-parallel group."""
        weight = self.module.output_weight()
        out = vocab_logprobs(
            self.module.gathered_hidden(hidden).index_select(0, micro_batch.positions),
            weight,
            micro_batch.targets,
            vocab_shard(len(weight), self.vocab, self.topology.tp_group),
            self.settings,
            objective=self.objective,
            fields=micro_batch.fields,
        )
        return HeadResult(out.loss, {"logprobs": out.logprobs, "entropy": out.entropy})


@dataclass(frozen=True)
class TokenScoreHead:
    """The score of every response token; `objective` trains their mean in each trajectory."""

    module: PackedGPT
    topology: Topology
    score_position: ScorePosition
    objective: SequenceObjective | None = None
    names: tuple[str, ...] = ("scores",)

    def __call__(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> HeadResult:
        """Collective over the context-parallel group.

        Under sequence parallelism over the tensor-parallel group as well.
        """
        scores = self.module.output_layer(hidden)[micro_batch.positions]
        if self.objective is None:
            return HeadResult(scores.new_zeros(()), {"scores": scores})
        means = mean_by_sequence(
            scores, micro_batch.sequence, micro_batch.response_lengths, self.topology.cp_group
        )
        loss = self.objective(means, micro_batch.rewards).sum()
        if self.topology.cp_rank > 0:
            # Each rank of the group has the whole loss, and its gradient by its own tokens' scores:
            # the gradients add up, the loss counts once.
            loss = loss - loss.detach()
        # The scores stay in the graph: a micro-batch without trajectories has a backward pass too.
        return HeadResult(loss + 0.0 * scores.sum(), {"scores": scores.detach()})


def mean_by_sequence(
    values: torch.Tensor,
    sequence: torch.Tensor,
    lengths: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Means over sequences whose tokens may be spread over a group; collective over it.

    The gradient of a mean reaches the values of this rank alone, as if every other rank used the
    mean for its own values.

    Args:
        values: `[n]`, one a token of this rank.
        sequence: `[n]`, the sequence that each belongs to.
        lengths: `[sequences]`, the tokens of each on all ranks.
        group: the ranks; None: this one.

    Returns:
        `[sequences]`, the same on every rank.
    """
    sums = values.new_zeros(len(lengths)).index_add(0, sequence, values)
    if group is not None and len(lengths):
        sums = reduce_from_tensor_model_parallel_region(sums, group=group)
    return sums / lengths
