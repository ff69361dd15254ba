"""What a loss and its tokens become in Megatron's hands: the contract behind every objective.

An objective is divided by the global denominators already, so the engine wants the plain sum over
micro-batches, data-parallel and context-parallel ranks. Megatron yields it where the loss function
returns three values and counts no tokens. This stands here, not among the contracts, since this
folder runs on both ends of the supported range.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel  # noqa: F401  which Megatron else imports at its first step
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_oreal.parallel.collectives import world_rank
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu
from tests.ranks import RankPools

pytestmark = pytest.mark.parallel

MICRO_BATCHES = (1.0, 2.0, 4.0)


class Line(MegatronModule):
    """One weight; its output is weight * x, whose slope is x."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(torch.ones(1))

    def set_input_tensor(self, _: Any) -> None:
        """Megatron asks it of every model; a first stage has no use for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def gradient(tokens: int | None) -> float:
    """The gradient of a rank's three losses x * 10^rank, with `tokens` reported for each.

    None stands for the older form of a loss function's result, which reports none.
    """
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=1,
        calculate_per_token_loss=tokens is not None,
        use_cpu_initialization=True,
    )
    with cuda_on_cpu():
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        line = Line(config)
        model = DistributedDataParallel(config, ddp, line)
        config.finalize_model_grads_func = finalize_model_grads
        model.zero_grad_buffer()

        def forward_step(batches: Iterator[float], wrapped: torch.nn.Module) -> tuple[Any, Any]:
            loss = wrapped(torch.tensor([next(batches)])).sum()
            if tokens is None:
                return loss, lambda out: (out, None)
            return loss, lambda out: (out, torch.tensor(tokens, dtype=torch.int), None)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([x * 10 ** world_rank() for x in MICRO_BATCHES]),
            model=[model],
            num_microbatches=len(MICRO_BATCHES),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
    main_grad: Any = line.weight.main_grad  # pyright: ignore[reportAttributeAccessIssue]
    return float(main_grad)


@pytest.mark.parametrize(
    ("dp", "cp", "total"), [(1, 1, 7), (2, 1, 77), (1, 2, 77), (2, 2, 7777)], ids=str
)
def test_no_tokens_reported_yield_the_plain_sum(
    ranks: RankPools, dp: int, cp: int, total: int
) -> None:
    """(1 + 2 + 4) * (1 + 10 + ...): over micro-batches, data- and context-parallel ranks."""
    assert ranks(dp * cp).run(gradient, 0, cp=cp) == [total] * (dp * cp)


def test_reported_tokens_would_divide(ranks: RankPools) -> None:
    """Two ranks, three micro-batches each, two tokens a micro-batch: 77 / 12."""
    assert ranks(2).run(gradient, 2) == pytest.approx([77 / 12] * 2)


@pytest.mark.parametrize(("dp", "cp", "scale"), [(2, 1, 1 / 2), (1, 2, 2 / 2)])
def test_the_older_form_would_scale(ranks: RankPools, dp: int, cp: int, scale: float) -> None:
    """By cp, by 1 / micro-batches, and by 1 / (dp * cp): why the engine does not use it."""
    expected = 77 * scale / len(MICRO_BATCHES)
    assert ranks(dp * cp).run(gradient, None, cp=cp) == pytest.approx([expected] * 2)
