"""What the engine takes for granted of Megatron-Core, in every release it is to run with."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer

from megatron_oreal.config.schema import OptimizerConfig
from megatron_oreal.models.heads import Fields
from megatron_oreal.models.qwen2 import QWEN2
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
