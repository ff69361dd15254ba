"""Weights over real ranks: Hugging Face -> Megatron -> Hugging Face, bitwise, in every layout."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.weights.bridge import HfStream, export_hf, load_hf, open_stream
from megatron_oreal.weights.checksum import tensor_checksum
from megatron_oreal.weights.geometry import Box
from megatron_oreal.weights.layout import MegatronPlace
from tests.ranks import RankPools
from tests.unit.weights.toy import DIMS, TIED, megatron_shard, random_hf, write_hf

pytestmark = pytest.mark.parallel

LAYOUTS = [
    (1, 1, 1),
    (2, 2, 1),
    (2, 1, 2),
    (4, 4, 1),
    (4, 2, 2),
    (4, 1, 2),
    (4, 2, 1),
]  # ranks, tp, pp
STAGES = {1: [3], 2: [2, 1]}
SMALL_ROUND = 4096  # bytes: several rounds, and tensors larger than one


def my_shard(dims: ModelDims, dtype: torch.dtype) -> tuple[MegatronPlace, dict[str, torch.Tensor]]:
    """Returns this rank's place and what it should hold."""
    here = topology.current()
    stages = STAGES[here.pp_size]
    place = MegatronPlace(here.tp_rank, here.tp_size, sum(stages[: here.pp_rank]))
    hf = random_hf(dims, dtype)
    shard = megatron_shard(hf, dims, place, stages[here.pp_rank], fused_norms=False)
    return place, shard


def loaded(
    folder: Path, dtype: torch.dtype
) -> tuple[ModelDims, MegatronPlace, dict[str, torch.Tensor]]:
    """Loads this rank's part of the folder and checks it against the shard cut by hand."""
    family, dims = read_model(folder)
    place, expected = my_shard(dims, dtype)
    params = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    load_hf(params, folder, family, dims, place)
    for name in expected:
        assert torch.equal(params[name], expected[name]), name
    return dims, place, params


def opened(
    folder: Path,
    dtype: torch.dtype,
    receivers: list[int] | None = None,
    ranks_per_node: int = 8,
) -> HfStream:
    dims, place, params = loaded(folder, dtype)
    return open_stream(
        params,
        QWEN2,
        dims,
        place,
        round_bytes=SMALL_ROUND,
        receivers=receivers,
        node=str(dist.get_rank() // ranks_per_node),
    )


def stream_everywhere(folder: Path, dtype: torch.dtype, ranks_per_node: int = 8) -> tuple[int, int]:
    stream = opened(folder, dtype, ranks_per_node=ranks_per_node)
    assert stream.summary.ratio == 1.0
    assert (stream.summary.bytes_across_nodes > 0) == (stream.summary.nodes > 1)
    hf = random_hf(read_model(folder)[1], dtype)
    for _ in range(2):  # the plan serves every push, and reads what the parameters are then
        sums = {}
        for name, tensor in stream.full_tensors():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, hf[name]), name
            sums[name] = int(
                tensor_checksum(tensor, Box.whole(tuple(tensor.shape)), tuple(tensor.shape))
            )
        assert list(sums) == list(QWEN2.tensors(read_model(folder)[1]))
        assert sums == stream.checksums()
        for param in stream.params.values():
            param.neg_()
        hf = {name: -tensor for name, tensor in hf.items()}
    return stream.summary.rounds, stream.summary.bytes_moved


def export_from_rank_0(folder: Path, out: Path, dtype: torch.dtype) -> None:
    stream = opened(folder, dtype, receivers=[0])
    export_hf(stream, out, source=folder, shard_bytes=3 * SMALL_ROUND)


def failing_export(folder: Path, out: Path) -> tuple[str, int]:
    """Returns the refusal this rank sees, and proves that the ranks are still in step."""
    stream = opened(folder, torch.float32, receivers=[0])
    with pytest.raises(UserError) as caught:
        export_hf(stream, out, source=folder, shard_bytes=SMALL_ROUND)
    alive = torch.ones(1, dtype=torch.int64)
    dist.all_reduce(alive)
    return str(caught.value), int(alive)


def export_to_a_disk_that_fills(folder: Path, out: Path) -> tuple[str, int]:
    """Lets no file grow beyond the small ones, so that a shard in mid-stream fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_ROUND, limits[1]))
    try:
        return failing_export(folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def stream_of_half_a_model() -> str:
    place, shard = my_shard(DIMS, torch.float32)
    shard.pop("decoder.final_layernorm.weight", None)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: no rank holds it") as caught:
        open_stream(shard, QWEN2, DIMS, place, round_bytes=SMALL_ROUND)
    return str(caught.value)


def flipped_bit_is_seen(folder: Path) -> list[str]:
    stream = opened(folder, torch.float32)
    before = stream.checksums()
    if dist.get_rank() == dist.get_world_size() - 1:
        weight = stream.params["decoder.layers.0.mlp.linear_fc1.weight"]
        weight.view(torch.int32)[-1, -1] ^= 1
    after = stream.checksums()
    return [name for name in before if before[name] != after[name]]


@pytest.mark.parametrize("dims", [DIMS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_gets_every_tensor_bitwise(
    ranks: RankPools, tmp_path: Path, dims: ModelDims, layout: tuple[int, int, int]
) -> None:
    size, tp, pp = layout
    folder = write_hf(tmp_path / "hf", dims, random_hf(dims))
    costs = ranks(size).run(stream_everywhere, folder, torch.float32, tp=tp, pp=pp)
    rounds, moved = costs[0]
    assert rounds > 1
    assert costs == [(rounds, moved)] * size
    assert (moved == 0) == (size == 1)


@pytest.mark.parametrize("layout", [(4, 4, 1), (4, 2, 2), (4, 1, 2)], ids=str)
def test_what_enters_a_node_once_is_relayed_within_it(
    ranks: RankPools, tmp_path: Path, layout: tuple[int, int, int]
) -> None:
    size, tp, pp = layout
    folder = write_hf(tmp_path / "hf", DIMS, random_hf(DIMS))
    ranks(size).run(stream_everywhere, folder, torch.float32, 2, tp=tp, pp=pp)


def test_bfloat16_travels_as_it_is(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", DIMS, random_hf(DIMS, torch.bfloat16))
    ranks(2).run(stream_everywhere, folder, torch.bfloat16, tp=2)


@pytest.mark.parametrize("dims", [DIMS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (4, 2, 2), (4, 4, 1)], ids=str)
def test_an_export_is_bitwise_the_import(
    ranks: RankPools, tmp_path: Path, dims: ModelDims, layout: tuple[int, int, int]
) -> None:
    size, tp, pp = layout
    hf = random_hf(dims)
    folder = write_hf(tmp_path / "hf", dims, hf)
    out = tmp_path / "out"
    ranks(size).run(export_from_rank_0, folder, out, torch.float32, tp=tp, pp=pp)
    files = set(
        json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    written = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert len(files) > 1
    assert written.keys() == hf.keys()
    assert all(torch.equal(written[name], hf[name]) for name in hf)
    assert read_model(out) == read_model(folder)


def test_a_refused_export_ends_alike_on_every_rank(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", DIMS, random_hf(DIMS))
    refusals = ranks(2).run(failing_export, folder, folder, tp=2)
    assert refusals == [refusals[0]] * 2
    assert "exists already" in refusals[0][0]
    assert refusals[0][1] == 2


def test_an_export_that_cannot_be_named_leaves_nothing(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", DIMS, random_hf(DIMS))
    (tmp_path / "file").touch()
    refusals = ranks(2).run(failing_export, folder, tmp_path / "file" / "out", tp=2)
    assert refusals == [refusals[0]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf"]


def test_an_export_that_fails_midway_ends_alike_and_leaves_nothing(
    ranks: RankPools, tmp_path: Path
) -> None:
    folder = write_hf(tmp_path / "hf", DIMS, random_hf(DIMS))
    refusals = ranks(2).run(export_to_a_disk_that_fills, folder, tmp_path / "out", tp=2)
    assert refusals == [refusals[0]] * 2
    assert "File too large" in refusals[0][0]
    assert refusals[0][1] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_ranks_that_do_not_make_up_a_model_are_refused_alike(ranks: RankPools) -> None:
    assert len(set(ranks(2).run(stream_of_half_a_model, pp=2))) == 1


def test_a_flipped_bit_changes_the_checksum_of_its_tensor_alone(
    ranks: RankPools, tmp_path: Path
) -> None:
    folder = write_hf(tmp_path / "hf", DIMS, random_hf(DIMS))
    changed = ranks(2).run(flipped_bit_is_seen, folder, tp=2)
    assert changed == [["model.layers.0.mlp.up_proj.weight"]] * 2
