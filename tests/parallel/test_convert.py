"""Hugging Face -> any Megatron layout -> another -> Hugging Face, bitwise; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.weights.convert import Rate, convert_to_hf, convert_to_megatron
from megatron_oreal.weights.sharded import MANIFEST, ShardedCheckpoint
from tests.ranks import RankPools
from tests.toy_models import TOYS, make_config, make_policy, open_models, whole_weights, write_toy

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).parents[2]
KIB = 1 << 10
Convert = Callable[..., list[str]]


def cut(source: Path, out: Path, tensor: int, pipeline: int, first: int | None = None) -> list[str]:
    said: list[str] = []
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, first_stage_layers=first)
    convert_to_megatron(source, out, layout, rate=Rate(said.append))
    return said


def join(source: Path, out: Path) -> list[str]:
    said: list[str] = []
    convert_to_hf(source, out, shard_bytes=16 * KIB, rate=Rate(said.append))
    return said


def refused(convert: Convert, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        convert(*arguments)
    return str(caught.value)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def policy_from(weights: Path, first: int | None = None) -> dict[str, torch.Tensor]:
    config = make_config(weights)
    layout = replace(config.parallel, first_stage_layers=first)
    source = open_models(replace(config, parallel=layout))
    return whole_weights(source, make_policy(source))


def assert_same(folder: Path, other: Path) -> None:
    want, got = read(folder), read(other)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("ranks_converting", [1, 2])
def test_there_and_back_again_is_bitwise(
    ranks: RankPools, tmp_path: Path, toy: str, dtype: torch.dtype, ranks_converting: int
) -> None:
    folder = write_toy(tmp_path / "hf", toy)
    tensors = {name: tensor.to(dtype) for name, tensor in read(folder).items()}
    save_file(tensors, folder / "model.safetensors")
    first, second = ((3, 3, 2), (1, 2)) if toy == "smollm2" else ((4, 2), (2, 1))
    world = ranks(ranks_converting)
    said = world.run(cut, folder, tmp_path / "first", *first)
    world.run(cut, tmp_path / "first", tmp_path / "second", *second)
    world.run(join, tmp_path / "second", tmp_path / "back")
    assert_same(folder, tmp_path / "back")
    assert sum(map(len, said)) == first[0] * first[1]
    assert all("100% of" in lines[-1] for lines in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "first", "hf", "second"]


@pytest.mark.parametrize("toy", ["qwen2_tied", "qwen3", "llama"])
def test_any_layout_trains_from_the_files_of_any_other(
    ranks: RankPools, tmp_path: Path, toy: str
) -> None:
    folder = write_toy(tmp_path / "hf", toy)
    ranks(2).run(cut, folder, tmp_path / "cut", 4, 1)
    for loaded in ranks(4).run(policy_from, tmp_path / "cut", tp=2, pp=2):
        assert loaded.keys() == read(folder).keys()
        assert all(torch.equal(loaded[name], t) for name, t in read(folder).items())


@pytest.mark.parametrize(("stages", "first"), [(2, 1), (3, 2)])
def test_stages_of_different_depth_are_loaded_and_left_bitwise(
    ranks: RankPools, tmp_path: Path, stages: int, first: int
) -> None:
    folder = write_toy(tmp_path / "hf", "smollm2")
    for loaded in ranks(stages).run(policy_from, folder, first, pp=stages):
        assert loaded.keys() == read(folder).keys()
        assert all(torch.equal(loaded[name], t) for name, t in read(folder).items())


def truncate(folder: Path) -> str:
    file = next(folder.glob("rank-00001*"))
    file.write_bytes(file.read_bytes()[:-8])
    return f"cannot read {file.name}"


def drop_file(folder: Path) -> str:
    file = next(folder.glob("rank-00001*"))
    file.unlink()
    return f"cannot read {file.name}"


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def forget_a_box(folder: Path) -> str:
    edit(folder, lambda m: next(iter(m["files"].values())).pop())
    return "regions cover"


def forget_a_tensor(folder: Path) -> str:
    edit(folder, lambda m: m.update(files={}) or m["tensors"].pop("model.norm.weight"))
    return "model.norm.weight is missing"


def point_outside(folder: Path) -> str:
    edit(folder, lambda m: m["files"].update({"../x.safetensors": []}))
    return "'../x.safetensors', which is not a file of the folder"


def lie_about_precision(folder: Path) -> str:
    edit(folder, lambda m: m["tensors"]["model.norm.weight"].update(dtype="bfloat16"))
    return "model.norm.weight/0 in rank-"


def lie_about_a_box(folder: Path) -> str:
    edit(folder, lambda m: next(iter(m["files"].values()))[0]["stop"].append(3))
    return f"{MANIFEST} says F32"


def garble(folder: Path) -> str:
    (folder / MANIFEST).write_bytes(b"\xff{")
    return f"cannot read {MANIFEST}"


def another_family(folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3"}))
    return "q_norm.weight is missing"


DAMAGE = [
    *(truncate, drop_file, forget_a_box, forget_a_tensor, point_outside),
    *(lie_about_precision, lie_about_a_box, garble, another_family),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_files_are_named_on_every_rank(
    ranks: RankPools, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    world = ranks(2)
    world.run(cut, write_toy(tmp_path / "hf", "qwen2"), tmp_path / "cut", 2, 1)
    expected = damage(tmp_path / "cut")
    refusals = world.run(refused, join, tmp_path / "cut", tmp_path / "out")
    assert refusals == [refusals[0]] * 2
    assert expected in refusals[0]
    assert "\n" not in refusals[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "hf"]


@pytest.mark.parametrize("convert", [cut, join])
def test_an_output_that_cannot_be_is_named(
    ranks: RankPools, tmp_path: Path, convert: Convert
) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2")
    (tmp_path / "file").touch()
    layout = (2, 1) if convert is cut else ()
    for out, message in ((folder, "exists already"), (tmp_path / "file" / "out", "cannot write")):
        refusals = ranks(2).run(refused, convert, folder, out, *layout)
        assert refusals == [refusals[0]] * 2
        assert message in refusals[0]
        assert "\n" not in refusals[0]
    refusal = ranks(1).run(refused, cut, folder, tmp_path / "out", 3, 1)[0]
    assert refusal.startswith("parallel.tensor=3: does not divide the model's 4 attention heads")


def test_a_box_is_read_across_files(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2")
    ranks(1).run(cut, folder, tmp_path / "cut", 4, 1)
    with ShardedCheckpoint(tmp_path / "cut") as stored:
        name = "model.layers.0.mlp.up_proj.weight"
        box = next(iter(stored._pieces[name]))[0].whole((48, 32))
        assert torch.equal(stored.read(name, box), read(folder)[name])


def test_the_tools_run_alone_and_under_torchrun(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "hf", "llama")
    torchrun = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    commands = [
        [*torchrun, "tools/convert_hf_to_megatron.py", folder, tmp_path / "cut", "--tensor", "2"],
        ["tools/convert_megatron_to_hf.py", tmp_path / "cut", tmp_path / "back"],
        ["tools/convert_megatron_to_hf.py", tmp_path / "cut", tmp_path / "back"],
    ]
    done = [
        subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        for command in commands
    ]
    assert [result.returncode for result in done] == [0, 0, 2], [r.stderr for r in done]
    assert "MiB/s" in done[0].stdout
    assert done[2].stderr.splitlines()[-1].endswith("remove it or name another folder")
    assert_same(folder, tmp_path / "back")
