"""What the engine takes for granted of Megatron-Core, in every release it is to run with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_oreal.config.schema import OptimizerConfig
from megatron_oreal.models.heads import Fields
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.parallel.collectives import world_rank
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu
from tests.ranks import RankPools
from tests.toy_models import (
    make_config,
    make_policy,
    make_trajectories,
    open_models,
    pack,
    write_model,
)

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


def test_the_hook_for_a_head_of_our_own_begins_with_the_hidden_states() -> None:
    assert list(inspect.signature(GPTModel._postprocess).parameters)[:2] == [
        "self",
        "hidden_states",
    ]


def test_the_optimizer_takes_overrides() -> None:
    parameter = inspect.signature(get_megatron_optimizer).parameters["config_overrides"]
    assert parameter.default is None


def no_slope(logprobs: torch.Tensor, fields: Fields) -> torch.Tensor:
    del fields
    return 0.0 * logprobs


def decay_alone(folder: Path, distributed_optimizer: bool) -> dict[str, float]:
    """One step without a gradient: how far each parameter ends from 0.95 of what it was."""
    config = make_config(
        folder,
        distributed_optimizer=distributed_optimizer,
        optimizer=OptimizerConfig(lr=1.0, weight_decay=0.1),
    )
    policy = make_policy(open_models(config))
    before = {name: value.clone() for name, value in policy.model.parameters().items()}
    step = policy.step(pack(make_trajectories()), no_slope, 0.5)
    assert step.grad_norm == 0.0
    return {
        name: float((value - 0.95 * before[name]).abs().max())
        for name, value in policy.model.parameters().items()
    }


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_weight_decay_falls_on_every_parameter_norms_and_biases_too(
    ranks: RankPools, tmp_path: Path, distributed_optimizer: bool
) -> None:
    folder = write_model(tmp_path / "hf", tied=False)
    for off in ranks(2).run(decay_alone, folder, distributed_optimizer):
        assert {name.rsplit(".", 2)[-2] for name in off} > {"linear_qkv", "final_layernorm"}
        assert any(name.endswith(".bias") for name in off)
        assert max(off.values()) < 1e-6, off


def wrong_marks(folder: Path) -> list[str]:
    """Parameters that Megatron counts otherwise in the gradient norm than they lie."""
    policy = make_policy(open_models(make_config(folder)))
    marks = {
        name: getattr(parameter, "tensor_model_parallel", False)
        for name, parameter in policy.model.named_parameters().items()
    }
    assert any(marks.values())
    return [name for name in marks if marks[name] != (QWEN2.find(name)[0].kind != "replicated")]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_what_is_cut_over_tensor_parallelism_is_marked_so(
    ranks: RankPools, tmp_path: Path, tp: int, pp: int, tied: bool
) -> None:
    folder = write_model(tmp_path / "hf", tied=tied)
    assert ranks(tp * pp).run(wrong_marks, folder, tp=tp, pp=pp) == [[]] * (tp * pp)
