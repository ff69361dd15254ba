"""The planner against parameter counts that are known, layouts built elsewhere, and hand sums."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oreal.cli import main
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config, ParallelConfig
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.models.registry import read_model
from megatron_oreal.planner.duration import (
    assumptions_for,
    decode_seconds,
    plan_duration,
    response_lengths,
)
from megatron_oreal.planner.hardware import GIB, GPUS, Cluster
from megatron_oreal.planner.memory import kv_bytes, plan_memory
from megatron_oreal.planner.plan import nearest_that_fit, plan_run
from megatron_oreal.planner.sizes import engine_parameters, parameters, stage_parameters
from megatron_oreal.weights.cluster import MegatronLayout
from megatron_oreal.weights.vllm_layout import vllm_regions
from tests.unit.weights.toy import DIMS, TIED

ROOT = Path(__file__).parents[3]
A100, H100 = Cluster(GPUS["a100-80"], 32), Cluster(GPUS["h100-80"], 128)
_, QWEN_7B = read_model(ROOT / "configs/models/qwen2.5-7b")
_, QWEN_32B = read_model(ROOT / "configs/models/qwen2.5-32b")
CLUSTERS = {"oreal_7b": A100, "oreal_dsr1_7b": A100, "oreal_32b": H100}


def recipe(name: str, *overrides: str) -> Config:
    return load_config([ROOT / "configs" / f"{name}.yaml"], ["data.path=d", *overrides])


def test_parameters_are_the_published_counts() -> None:
    assert parameters(QWEN_7B) == 7_615_616_512
    assert parameters(QWEN_32B) == 32_763_876_352


@pytest.mark.parametrize("dims", [replace(DIMS, layers=4), replace(TIED, layers=4)])
@pytest.mark.parametrize(
    ("tensor", "pipeline", "last"),
    [(1, 1, None), (2, 1, None), (4, 2, None), (1, 4, None), (2, 2, 1)],
)
def test_a_rank_holds_what_its_layout_says(
    dims, tensor: int, pipeline: int, last: int | None
) -> None:
    cut = ParallelConfig(tensor=tensor, pipeline=pipeline, last_stage_layers=last)
    layout = MegatronLayout(QWEN2, dims, tensor * pipeline, cut)
    for stage in range(pipeline):
        held = sum(math.prod(shape) for shape in layout.shapes(stage).values())
        assert stage_parameters(dims, cut, stage, "vocab") == held


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_an_engine_holds_what_its_layout_says(tensor: int) -> None:
    """Two key-value heads: four ranks hold each twice."""
    dims = replace(DIMS, layers=4, vocab=64)
    held = sum(region.box.size for region in vllm_regions(QWEN2, dims, 0, tensor))
    assert engine_parameters(dims, tensor) == held


def test_memory_of_the_7b_recipe_by_hand() -> None:
    """TP 4, DP 8; a rank has 1,904,021,376 parameters of the policy, 136,245,760 of its head."""
    memory = plan_memory(recipe("oreal_7b"), QWEN_7B, A100)
    parts = memory.phases["policy"]
    policy = (7_615_616_512 - 57 * 3584) // 4 + 57 * 3584  # norms lie on every rank
    token_rm = policy - 152_064 * 3584 // 4 + 3584
    assert parts["weights"] == 2 * (2 * policy + token_rm)
    assert parts["gradients"] == 4 * (policy + token_rm)
    assert parts["optimizer"] == math.ceil(12 * policy / 8) + math.ceil(12 * token_rm / 8)
    # 4 h + 2 (q + kv) rows + 4 f elements of two bytes a token and layer, cut by 4; 28 + 1 layers.
    elements = 4 * 3584 + 2 * 3584 + 2 * 512 + 4 * 18_944
    assert parts["activations"] == 29 * 16_384 * elements * 2 // 4
    assert sum(parts.values()) == memory.peak
    assert memory.peak_phase == "policy"
    assert kv_bytes(recipe("oreal_7b"), QWEN_7B) == 2 * 28 * 2 * 128 * 2


def test_activations_of_other_layouts_by_hand() -> None:
    """A layer of the recipe above needs 16,384 x (4 h + 2 (q + kv) + 4 f) / 4 x 2 bytes."""
    elements = 4 * 3584 + 2 * 3584 + 2 * 512 + 4 * 18_944
    layer = 16_384 * elements * 2 // 4
    mlp, residual = 16_384 * 18_944 * 2, 16_384 * 3584 * 2 // 4

    def activations(*overrides: str) -> int:
        found = plan_memory(recipe("oreal_7b", *overrides), QWEN_7B, A100)
        return found.phases["policy"]["activations"]

    assert activations("engine.recompute=selective") == 28 * (layer - mlp) + layer
    assert activations("engine.recompute=full") == 28 * residual + layer
    assert activations("parallel.context=2") == 29 * layer // 2
    # The first of two stages of 14 layers has two micro-batches in flight; interleaved by two, five
    # of seven layers each.
    assert activations("parallel.pipeline=2") == 29 * layer
    interleaved = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    assert activations(*interleaved) == 14 * 5 * layer // 2 + layer


def test_context_parallel_ranks_share_the_optimizer() -> None:
    plain, shared = (
        plan_memory(recipe("oreal_7b", f"parallel.context={cp}"), QWEN_7B, A100) for cp in (1, 2)
    )
    assert plain.phases["policy"]["optimizer"] == shared.phases["policy"]["optimizer"]


def test_a_run_without_a_token_reward_model_holds_one_model_less() -> None:
    whole = plan_memory(recipe("oreal_7b"), QWEN_7B, A100)
    without = plan_memory(recipe("oreal_7b_no_token_rm"), QWEN_7B, A100)
    assert "token_rm" not in without.phases
    assert without.peak < whole.peak - 10 * GIB


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("end", ["", "_no_token_rm"])
def test_every_recipe_fits_its_cluster(name: str, end: str) -> None:
    config, cluster = recipe(name + end), CLUSTERS[name]
    _, dims = read_model(ROOT / config.model.path)
    plan = plan_run(config, dims, cluster)
    assert plan.memory.peak <= cluster.gpu.memory
    assert plan.duration.slots * 1000 < plan.memory.kv_tokens


def test_the_published_run_within_a_factor_of_two() -> None:
    """OREAL-7B: 90 iterations on 32 A100 in nine hours (arXiv:2502.06781)."""
    hours = plan_run(recipe("oreal_7b"), QWEN_7B, A100).duration.run / 3600
    assert 4.5 <= hours <= 18


def test_a_layout_that_does_not_fit_is_refused_with_three_that_do() -> None:
    config = recipe("oreal_32b", "parallel.pipeline=2", "rollout.tensor_parallel=4")
    with pytest.raises(UserError) as caught:
        plan_run(config, QWEN_32B, H100)
    text = str(caught.value)
    assert "\n" not in text
    assert "does not fit 128 x h100-80: phase token_rm needs" in text
    assert text.count(" | ") == 2
    near = nearest_that_fit(config, QWEN_32B, H100)
    assert len(near) == 3
    for other in near:
        assert plan_run(other, QWEN_32B, H100).memory.fits


def test_a_cache_too_small_for_one_response_is_refused() -> None:
    config = recipe("oreal_7b", "rollout.gpu_memory_utilization=0.13")
    with pytest.raises(UserError, match=r"the cache holds \d+ tokens, one response may have 16384"):
        plan_run(config, QWEN_7B, A100)


def test_where_nothing_fits_the_refusal_says_so() -> None:
    small = Cluster(GPUS["a100-40"], 8)
    with pytest.raises(UserError, match="no layout fits: take more or larger GPUs"):
        plan_run(recipe("oreal_7b"), QWEN_7B, small)


class Constant:
    """A step of one second, whatever it does."""

    prompt = 0

    def seconds(self, sequences: int, kv_tokens: float) -> float:
        del sequences, kv_tokens
        return 1.0


def test_an_engine_takes_as_long_as_its_longest_response_or_its_queue() -> None:
    assert decode_seconds([3, 10, 4], 3, Constant()) == 10  # pyright: ignore[reportArgumentType]
    assert decode_seconds([5, 5, 5, 5], 1, Constant()) == 20  # pyright: ignore[reportArgumentType]
    assert decode_seconds([5, 5, 5, 5], 2, Constant()) == 10  # pyright: ignore[reportArgumentType]


def test_lengths_are_quantiles_cut_at_the_limit() -> None:
    config = recipe("oreal_7b")
    lengths = response_lengths(1000, config, assumptions_for(config))
    assert max(lengths) == 14_000
    assert 0.9 * 14_000 / 3 < sum(lengths) / 1000 < 14_000 / 3


def test_a_frozen_iteration_trains_only_the_token_reward_model() -> None:
    config = recipe("oreal_7b")
    kv = plan_memory(config, QWEN_7B, A100).kv_tokens
    duration = plan_duration(config, QWEN_7B, A100, kv, assumptions_for(config))
    assert duration.frozen["token_rm"] == duration.phases["token_rm"]
    assert duration.frozen["policy"] == duration.phases["reference"]
    assert duration.frozen["sync"] == 0


def arguments(*more: str) -> list[str]:
    model = f"model.path={ROOT}/configs/models/qwen2.5-7b"
    return ["plan", "--config", f"{ROOT}/configs/oreal_7b.yaml", "--ranks", "32", *more, model]


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--gpu", "a100-80")) == 0
    out = capsys.readouterr().out
    assert "32 x a100-80" in out
    assert "taken for granted (docs/planner.md)" in out
    assert main(arguments("--json", "--mean-response-tokens", "2000")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumptions"]["mean_response_tokens"] == 2000
    assert found["bytes"]["peak"] == sum(found["bytes"]["phases"]["policy"].values())


def test_the_command_refuses_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("parallel.tensor=1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nearest that fit: parallel.tensor=" in line


def test_engines_in_servers_are_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    served = arguments("rollout.backend=vllm_server", "rollout.server_hosts=[http://a:1]")
    assert main(served) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.backend=vllm_server: plans are of engines inside the training ranks" in line


def test_planning_imports_no_torch() -> None:
    program = f"""
import sys
from megatron_oreal.cli import main
assert main({arguments()}) == 0
sys.exit(bool({{"torch", "transformers", "vllm"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
