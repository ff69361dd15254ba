"""A cluster's weights from dimensions alone: the 32B run on 128 GPUs, and smaller ones by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_oreal.cli import main
from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.config.stages import layers_of_stages
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
    settings = [*(text for text in extra if "=" in text), model]
    options = [text for text in extra if "=" not in text]
    return ["plan", "weights", "--config", str(CONFIG_32B), *options, *settings]


HALVES = ["parallel.tensor=8", "parallel.pipeline=2", "rollout.tensor_parallel=4"]
QUARTERS = ["parallel.tensor=4", "parallel.pipeline=4", "rollout.tensor_parallel=4"]
APART = ["--rollout-ranks", "128"]


@pytest.mark.parametrize(
    ("options", "copies_across", "engines"),
    [
        (HALVES, 16 / 2, 32),
        (QUARTERS, 16 * 3 / 4, 32),
        ([*HALVES, *APART], 16, 32),
        ([*HALVES, "--whole-tensors"], 16 / 2, 128),
    ],
    ids=["tp8 pp2", "tp4 pp4", "apart", "whole tensors"],
)
def test_the_32b_plan_crosses_nodes_as_little_as_can_be(
    capsys: pytest.CaptureFixture[str], options: list[str], copies_across: float, engines: int
) -> None:
    """A node of eight holds a half or a quarter of the model, or nothing, and wants all of it."""
    assert main(arguments("--ranks", "128", "--json", *options)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["nodes"]) == ((256, 32) if APART[0] in options else (128, 16))
    across = found["bytes_across_nodes"]
    assert across <= 1.02 * found["lower_bound_across_nodes"]
    assert across == pytest.approx(copies_across * BYTES_32B, rel=1e-3)
    for load in (found["node_sends"], found["node_receives"]):
        assert load["mean"] == pytest.approx(across / 16)
        assert load["largest"] <= 1.1 * load["mean"]
    assert found["largest_round"] <= 256 << 20
    total = found["bytes_local"] + found["bytes_in_node"] + across
    assert total >= engines * BYTES_32B  # norms lie on every rank of an engine


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--ranks", "16", *HALVES)) == 0
    out = capsys.readouterr().out
    assert "ranks, nodes            16, 2" in out
    assert "ratio 1.000" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ranks", "24"], "does not divide WORLD_SIZE(24)"),
        (
            ["--ranks", "128", "--rollout-ranks", "6", "rollout.tensor_parallel=4"],
            "rollout.tensor_parallel=4: does not divide WORLD_SIZE(6)",
        ),
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


def counted_over_the_model(name: str, offset: int) -> str:
    return re.sub(r"(?<=layers\.)\d+", lambda layer: str(int(layer.group()) + offset), name)


def test_virtual_stages_are_interleaved() -> None:
    """Of six layers the first rank of three has 0 and 3; uneven, of two, 0 and 3 or 1, 2, 4, 5."""
    dims = replace(TOY, layers=6)
    for cut, expected in (
        (ParallelConfig(pipeline=3, virtual_pipeline=2), [[0, 3], [1, 4], [2, 5]]),
        (
            ParallelConfig(pipeline=2, virtual_pipeline=2, first_stage_layers=2),
            [[0, 3], [1, 2, 4, 5]],
        ),
    ):
        layout = MegatronLayout(QWEN2, dims, cut.pipeline, cut)
        for stage, layers in enumerate(expected):
            found = set(re.findall(r"layers\.(\d+)", " ".join(layout.shapes(stage))))
            assert sorted(map(int, found)) == layers


@pytest.mark.parametrize("dims", [TOY, replace(TIED, layers=4)], ids=["untied", "tied"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("pipeline", "first"), [(1, None), (2, None), (2, 1)])
def test_parameters_are_those_of_shards_cut_by_hand(
    dims: ModelDims, tensor: int, pipeline: int, first: int | None
) -> None:
    cut = ParallelConfig(tensor=tensor, pipeline=pipeline, first_stage_layers=first)
    layout = MegatronLayout(QWEN2, dims, tensor * pipeline, cut)
    stages = layers_of_stages(cut, dims.layers)
    for stage in range(pipeline):
        shapes = layout.shapes(stage)
        place = MegatronPlace(0, tensor, sum(stages[:stage]))
        shard = megatron_shard(random_hf(dims), dims, place, stages[stage], fused_norms=False)
        shard = {counted_over_the_model(name, place.layer_offset): t for name, t in shard.items()}
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
    cut = ParallelConfig(tensor=tensor, pipeline=pipeline)
    layout = MegatronLayout(QWEN2, TOY, 4, cut)
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
