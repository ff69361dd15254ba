"""The cache that an engine gets of a GPU, on sums a person can do, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config
from megatron_oreal.models.registry import read_model
from megatron_oreal.planner.engine_memory import KEPT_BACK, FreeMemory, cache_bytes
from megatron_oreal.planner.hardware import GIB, GPUS, Cluster
from megatron_oreal.planner.memory import engine_parts, kv_bytes, plan_memory, planned_phases

ROOT = Path(__file__).parents[3]
_, QWEN_7B = read_model(ROOT / "configs/models/qwen2.5-7b")
TOTAL = 80 * GIB
A100 = Cluster(GPUS["a100-80"], 32)


def config_of(*settings: str) -> Config:
    return load_config([ROOT / "configs/oreal_7b.yaml"], ["data.path=d", *settings])


def test_the_cache_is_what_its_share_leaves_beside_the_engine():
    config = config_of("rollout.gpu_memory_utilization=0.5")
    parts = engine_parts(config, QWEN_7B)
    assert set(parts) == {"engine weights", "engine work space", "CUDA graphs"}
    assert cache_bytes(config, QWEN_7B, FreeMemory(70 * GIB, TOTAL)) == 40 * GIB - sum(
        parts.values()
    )


def test_what_training_has_yet_to_take_is_not_the_engines():
    config = config_of("rollout.gpu_memory_utilization=0.9")
    cache = cache_bytes(config, QWEN_7B, FreeMemory(50 * GIB, TOTAL, to_come=10 * GIB))
    assert cache + sum(engine_parts(config, QWEN_7B).values()) == 40 * GIB - KEPT_BACK


def test_a_cache_under_one_sequence_says_which_share_would_do():
    """TP 2: 7.1 GiB of weights, 2.9 of work space, 1 of graphs, 28,672 bytes a token."""
    config = config_of("rollout.gpu_memory_utilization=0.13")
    with pytest.raises(UserError) as caught:
        cache_bytes(config, QWEN_7B, FreeMemory(70 * GIB, TOTAL))
    text = str(caught.value)
    needed = sum(engine_parts(config, QWEN_7B).values()) + 1025 * 16 * 28_672
    assert text == (
        f"rollout.gpu_memory_utilization=0.13: the engine needs {needed / GIB:.1f} GiB (engine"
        " weights 7.1, engine work space 2.2, CUDA graphs 1.0, one sequence of 16384 tokens 0.4),"
        " and gets 10.4 of 80.0 GiB; set 0.14 or more, raise rollout.tensor_parallel, or lower"
        " sampling.max_total_tokens"
    )
    share = text.split("set ")[1].split()[0]
    mended = config_of(f"rollout.gpu_memory_utilization={share}")
    assert cache_bytes(mended, QWEN_7B, FreeMemory(70 * GIB, TOTAL)) >= 1025 * 16 * 28_672


def test_an_engine_that_does_not_fit_says_what_takes_the_memory():
    config = config_of("rollout.gpu_memory_utilization=0.5")
    with pytest.raises(UserError) as caught:
        cache_bytes(config, QWEN_7B, FreeMemory(20 * GIB, TOTAL, to_come=12 * GIB))
    text = str(caught.value)
    assert "\n" not in text
    assert "gets 7.0: of 80.0 GiB 20.0 are free, 12.0 of them the training's; raise" in text


def test_quantised_weights_and_cache_take_half():
    plain, fp8 = (
        config_of(*settings)
        for settings in ((), ("rollout.quantization=fp8", "rollout.kv_cache_dtype=fp8"))
    )
    assert kv_bytes(plain, QWEN_7B) == 2 * kv_bytes(fp8, QWEN_7B)
    weights = [engine_parts(config, QWEN_7B)["engine weights"] for config in (plain, fp8)]
    # 28 layers: q and o 3584 wide, k and v 512, three matrices of the MLP; each of two ranks half.
    matrices = 28 * (2 * 3584 + 2 * 512 + 3 * 18_944) * 3584 // 2
    assert weights[0] - weights[1] == matrices


def test_engines_that_do_not_sleep_are_there_in_every_phase():
    asleep, awake = (
        plan_memory(config_of(f"rollout.sleep={sleep}"), QWEN_7B, A100) for sleep in (True, False)
    )
    assert asleep.total("generate") == awake.total("generate")
    engine = sum(awake.phases["policy"][part] for part in ("engine weights", "KV cache"))
    engine += awake.phases["policy"]["engine work space"]
    assert awake.total("policy") - asleep.total("policy") == engine
    assert "KV cache" not in asleep.phases["sync"]
    assert asleep.phases["sync"]["engine weights"] == awake.phases["sync"]["engine weights"]


def test_the_end_of_a_phase_may_show_the_most_of_those_since_the_engines_slept():
    memory = plan_memory(config_of(), QWEN_7B, A100)
    planned = planned_phases(memory, sleeps=True)
    trains = max(memory.total("reference"), memory.total("token_rm"), memory.total("policy"))
    assert planned["reference"] == planned["policy"] == trains
    assert planned["generate"] == planned["sync"] == memory.total("generate")
    kept = ("weights", "gradients", "optimizer", "reserve", "CUDA graphs")
    assert planned["sleep"] == sum(memory.phases["policy"][part] for part in kept)
    awake = plan_memory(config_of("rollout.sleep=false"), QWEN_7B, A100)
    assert planned_phases(awake, sleeps=False)["sleep"] == awake.total("generate")
