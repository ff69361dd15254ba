"""A policy's weights straight into the parameters that an engine computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.parallel.collectives import world_rank, world_size
from megatron_oreal.weights.plan import PlanSummary, RankRound, TensorSpec, make_plan, owned_regions
from megatron_oreal.weights.sums import Checksums, SourceSums, held_sums, source_sums
from megatron_oreal.weights.transport import Meddle, execute, lasting_view
from megatron_oreal.weights.vllm_layout import LiveShard, vllm_regions

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from megatron_oreal.models.family import Family, ModelDims
    from megatron_oreal.weights.bridge import Survey
    from megatron_oreal.weights.geometry import Region
    from megatron_oreal.weights.transport import View


@dataclass(frozen=True)
class InPlace:
    """A plan from a policy's parameters into live ones, made once; see `open_in_place`.

    Holds both: each pass reads what the policy's are then.
    """

    tensors: tuple[TensorSpec, ...]
    summary: PlanSummary
    rounds: tuple[RankRound, ...]
    regions: tuple[Region, ...]
    params: Mapping[str, torch.Tensor]
    live: LiveShard
    sums: SourceSums
    read: View
    write: View

    def carry(self, meddle: Meddle | None = None) -> None:
        """Writes the policy's present weights into the live ones; collective over the world."""
        device = next(iter(self.params.values())).device
        execute(self.rounds, self.read, self.write, device=device, meddle=meddle)

    def expected(self) -> Checksums:
        """Returns what this rank's live parameters must come to; collective over the world."""
        return self.sums.count()[self.live.rank]

    def found(self) -> Checksums:
        """Returns what this rank's live parameters come to; not collective."""
        return held_sums(self.tensors, self.regions, self.live.parameters)


def answered_sums(family: Family, dims: ModelDims, live: LiveShard) -> Checksums:
    """Returns the checksums of the parts that one rank of an engine answers for; not collective.

    A part that several ranks hold is counted by one of them: those of all ranks of an engine,
    added, are the checksums of the whole tensors.
    """
    dtype = next(iter(live.parameters.values())).dtype
    tensors = [TensorSpec(n, shape, dtype) for n, shape in family.tensors(dims).items()]
    layouts = [vllm_regions(family, dims, rank, live.size) for rank in range(live.size)]
    return held_sums(tensors, owned_regions(tensors, layouts)[live.rank], live.parameters)


def open_in_place(
    survey: Survey,
    params: Mapping[str, torch.Tensor],
    family: Family,
    dims: ModelDims,
    live: LiveShard,
    *,
    round_bytes: int,
) -> InPlace:
    """Plans how a policy's weights reach live parameters; pure, but for this rank's own place.

    The live parameters must be plain on every rank, see `vllm_layout.difference`.

    Args:
        survey: Who holds what of the policy.
        params: This rank's parameters of it, by their names in `GPTModel.named_parameters()`.
        family: The model's family.
        dims: The model's dimensions.
        live: This rank's part of its engine; all engines are of one size.
        round_bytes: Bound on what travels at a time, and so on memory.
    """
    layouts = [vllm_regions(family, dims, rank, live.size) for rank in range(live.size)]
    targets = [layouts[rank % live.size] for rank in range(world_size())]
    plan = make_plan(survey.tensors, survey.sources, targets, round_bytes, survey.nodes)
    rank = world_rank()
    return InPlace(
        tensors=survey.tensors,
        summary=plan.summary(),
        rounds=tuple(plan.part_of(rank)),
        regions=tuple(targets[rank]),
        params=params,
        live=live,
        sums=source_sums(survey.tensors, survey.sources, layouts, rank=rank, params=params),
        read=lasting_view(params),
        write=lasting_view(live.parameters),
    )
