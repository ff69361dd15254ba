"""How many layers the stages of a pipeline hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_oreal.config.schema import ParallelConfig


def layers_of_stages(parallel: ParallelConfig, layers: int) -> tuple[int, ...]:
    """Returns how many of a model's layers each pipeline stage holds, the first one first.

    They add up to `layers` where `validate.check_model` accepts the layout.
    """
    ends = {0: parallel.first_stage_layers, parallel.pipeline - 1: parallel.last_stage_layers}
    given = {stage: held for stage, held in ends.items() if held is not None}
    others = parallel.pipeline - len(given)
    share = (layers - sum(given.values())) // others if others else 0
    return tuple(given.get(stage, share) for stage in range(parallel.pipeline))
