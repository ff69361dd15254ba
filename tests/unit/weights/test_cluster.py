"""A cluster's weights from dimensions alone: the 32B run on 128 GPUs, and smaller ones by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_oreal.cli import main
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.weights.cluster import MegatronLayout, plan_sync
from megatron_oreal.weights.geometry import Box, Region
from megatron_oreal.weights.layout import MegatronPlace
from megatron_oreal.weights.vllm_layout import vllm_regions
from tests.unit.weights.toy import DIMS, TIED, megatron_shard, random_hf

ROOT = Path(__file__).parents[3]
CONFIG_32B = ROOT / "configs/oreal_32b.yaml"
BYTES_32B = 2 * 32_763_876_352  # bf16 parameters of Qwen2.5-32B
TOY = replace(DIMS, layers=4, vocab=64)


def arguments(*extra: str) -> list[str]:
    model = f"model.path={ROOT}/configs/models/qwen2.5-32b"
    layout = ["parallel.pipeline=2", "rollout.tensor_parallel=4"]  # halves, engines in half a node
    settings = [*layout, *(text for text in extra if "=" in text), model]
    options = [text for text in extra if "=" not in text]
    return ["plan", "weights", "--config", str(CONFIG_32B), *options, *settings]


@pytest.mark.parametrize("whole", [[], ["--whole-tensors"]], ids=["parts", "whole"])
def test_the_32b_plan_crosses_nodes_as_little_as_can_be(
    capsys: pytest.CaptureFixture[str], whole: list[str]
) -> None:
    """A node holds one stage of two and wants both, whatever its engines keep."""
    assert main(arguments("--ranks", "128", "--json", *whole)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["nodes"], found["ratio"]) == (128, 16, 1.0)
    across, norm = found["bytes_across_nodes"], 2 * 5120
    # The final norm belongs to the second stage: all else is halves of equal size.
    assert abs(across - 8 * BYTES_32B) <= 8 * norm
    assert found["busiest_node_sends"] < 1.001 * across / 16
    assert found["busiest_node_receives"] < 1.001 * across / 16
    total = found["bytes_local"] + found["bytes_in_node"] + across
    copies = 128 if whole else 32
    assert total >= copies * BYTES_32B  # norms lie on every rank of an engine


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--ranks", "16")) == 0
    out = capsys.readouterr().out
    assert "ranks, nodes            16, 2" in out
    assert "ratio 1.000" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ranks", "24"], "does not divide WORLD_SIZE(24)"),
        (
            ["--ranks", "128", "parallel.tensor=1", "parallel.pipeline=128"],
            "parallel.pipeline=128: does not divide the model's 64 layers",
        ),
    ],
)
def test_an_impossible_cluster_is_one_line(
    capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main(arguments(*extra)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("dims", [TOY, replace(TIED, layers=4)], ids=["untied", "tied"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_parameters_are_those_of_shards_cut_by_hand(
    dims: ModelDims, tensor: int, pipeline: int
) -> None:
    layout = MegatronLayout(QWEN2, dims, tensor * pipeline, tensor, pipeline)
    layers = dims.layers // pipeline
    for stage in range(pipeline):
        shapes = layout.shapes(stage)
        place = MegatronPlace(0, tensor, stage * layers)
        shard = megatron_shard(random_hf(dims), dims, place, layers, fused_norms=False)
        assert shapes.keys() == shard.keys()
        padded = {"embedding.word_embeddings.weight", "output_layer.weight"}
        assert all(shapes[name] == shard[name].shape for name in shard.keys() - padded)


def test_a_rank_of_an_engine_holds_fused_projections_and_a_copied_head() -> None:
    """Two key-value heads of four rows; TP 4: rank 3 has the second, as rank 2 has."""
    regions = {r.tensor: r for r in vllm_regions(QWEN2, TOY, 3, 4) if "layers" not in r.tensor}
    assert regions["lm_head.weight"].box == Box((48, 0), (64, 16))
    prefix = "model.layers.1.self_attn."
    found = [r for r in vllm_regions(QWEN2, TOY, 3, 4) if r.key == prefix + "qkv_proj.bias"]
    key = prefix + "qkv_proj.bias"
    assert found == [
        Region(prefix + "q_proj.bias", Box((24,), (32,)), key, Box((0,), (8,))),
        Region(prefix + "k_proj.bias", Box((4,), (8,)), key, Box((8,), (12,))),
        Region(prefix + "v_proj.bias", Box((4,), (8,)), key, Box((12,), (16,))),
    ]


@pytest.mark.parametrize("engine", [1, 2, 4])
@pytest.mark.parametrize(("tensor", "pipeline"), [(4, 1), (2, 2), (1, 1)])
def test_a_node_receives_what_it_lacks_once(engine: int, tensor: int, pipeline: int) -> None:
    """Four ranks on two nodes: one lacks nothing that holds all, or what its engine keeps."""
    layout = MegatronLayout(QWEN2, TOY, 4, tensor, pipeline)
    options = {"dtype": torch.float32, "round_bytes": 1 << 16}
    plan = plan_sync(layout, engine, **options, ranks_per_node=2)
    alone = plan_sync(layout, engine, **options, ranks_per_node=4)
    cost = plan.summary()
    assert cost.ratio == 1.0
    assert (cost.bytes_across_nodes == 0) == (tensor == 1 or tensor == engine == 4)
    assert alone.summary().bytes_across_nodes == 0
    assert cost.bytes_local + cost.bytes_moved == (
        alone.summary().bytes_local + alone.summary().bytes_moved
    )
