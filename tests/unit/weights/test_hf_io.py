"""Hugging Face folders: lazy reading, streamed writing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.family import Family
from megatron_oreal.models.llama import LLAMA
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.models.qwen3 import QWEN3
from megatron_oreal.weights import bridge
from megatron_oreal.weights.geometry import Box
from megatron_oreal.weights.hf_io import HfCheckpoint, HfWriter
from megatron_oreal.weights.layout import MegatronPlace
from megatron_oreal.weights.plan import TensorSpec
from tests.unit.weights.toy import DIMS, megatron_shard, random_hf, write_hf

NONE: frozenset[str] = frozenset()
SPECS = [TensorSpec("a", (2, 3), torch.float32), TensorSpec("b", (4,), torch.float32)]
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source", DIMS, random_hf(DIMS))


def refuse(folder: Path, message: str) -> None:
    """Checks that opening and auditing the folder ends in one line with this text."""
    with pytest.raises(UserError, match=message) as caught, HfCheckpoint(folder) as checkpoint:
        checkpoint.audit(QWEN2.tensors(DIMS), NONE)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_boxes_come_out_as_they_are_in_the_file(source: Path) -> None:
    hf = random_hf(DIMS)
    with HfCheckpoint(source) as checkpoint:
        checkpoint.audit(QWEN2.tensors(DIMS), NONE)
        for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
            box = Box((3, 2), (7, 16))
            assert torch.equal(checkpoint.read(name, box), hf[name][3:7, 2:16])
        norm = checkpoint.read("model.norm.weight", Box((5,), (9,)))
        assert torch.equal(norm, hf["model.norm.weight"][5:9])


def test_large_tensors_are_read_in_parts(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "_READ_BYTES", 100)
    place = MegatronPlace(1, 2, 0)
    expected = megatron_shard(random_hf(DIMS), DIMS, place, DIMS.layers, fused_norms=True)
    params = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    bridge.load_hf(params, source, QWEN2, DIMS, place)
    assert all(torch.equal(params[name], expected[name]) for name in expected)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    refuse(tmp_path, "no model.safetensors and no model.safetensors.index.json")


def test_an_absent_shard(source: Path) -> None:
    (source / "b.safetensors").unlink()
    refuse(source, "cannot read b.safetensors")


def test_a_truncated_shard(source: Path) -> None:
    shard = source / "a.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    refuse(source, "cannot read a.safetensors")


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"[]", b'{"weight_map": {"a": 3}}'])
def test_a_malformed_index(source: Path, garbage: bytes) -> None:
    (source / "model.safetensors.index.json").write_bytes(garbage)
    refuse(source, "is not an index of safetensors")


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "", "sub/a.safetensors"])
def test_an_index_that_points_outside(source: Path, file: str) -> None:
    index = {"weight_map": {"model.norm.weight": file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(source, "is not a file of the folder")


def test_an_index_that_lies(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.nothing"] = "a.safetensors"
    path.write_text(json.dumps(index))
    refuse(source, "names model.nothing, which is not in a.safetensors")


def test_missing_left_over_and_misshapen_tensors(tmp_path: Path) -> None:
    hf = random_hf(DIMS)
    norm = hf.pop("model.norm.weight")
    refuse(write_hf(tmp_path / "1", DIMS, hf), r"model\.norm\.weight is missing \(1 in all\)")
    hf |= {"model.norm.weight": norm, "model.extra": norm}
    refuse(write_hf(tmp_path / "2", DIMS, hf), r"model\.extra is not part of such a model")
    hf["model.norm.weight"] = hf.pop("model.extra")[:3]
    refuse(write_hf(tmp_path / "3", DIMS, hf), r"model\.norm\.weight has shape \(3,\), .*\(16,\)")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (LLAMA, r"model\.layers\.0\.self_attn\.k_proj\.bias is not part of such a model"),
        (QWEN3, r"model\.layers\.0\.self_attn\.q_norm\.weight is missing \(6 in all\)"),
    ],
    ids=["llama", "qwen3"],
)
def test_the_checkpoint_of_another_family(source: Path, family: Family, message: str) -> None:
    with pytest.raises(UserError, match=message), HfCheckpoint(source) as checkpoint:
        checkpoint.audit(family.tensors(DIMS), NONE)


def test_an_unsupported_precision(tmp_path: Path) -> None:
    hf = random_hf(DIMS)
    hf["model.norm.weight"] = hf["model.norm.weight"].to(torch.int64)
    refuse(write_hf(tmp_path / "m", DIMS, hf), r"model\.norm\.weight has dtype I64")


def test_a_tied_copy_and_old_rotary_buffers_may_be_there(tmp_path: Path) -> None:
    hf = random_hf(DIMS)
    hf["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    shapes = QWEN2.tensors(DIMS)
    del shapes["lm_head.weight"]
    with HfCheckpoint(write_hf(tmp_path / "m", DIMS, hf)) as checkpoint:
        checkpoint.audit(shapes, frozenset({"lm_head.weight"}))


@pytest.mark.parametrize(("shard_bytes", "files"), [(1000, 1), (24, 2)])
def test_what_is_written_is_what_came(
    source: Path, tmp_path: Path, shard_bytes: int, files: int
) -> None:
    folder = tmp_path / "out" / "model"
    writer = HfWriter(folder, source, SPECS, shard_bytes)
    for name, tensor in TENSORS.items():
        assert not folder.exists()
        writer.add(name, tensor)
    writer.finish()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == files
    read = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert (folder / "model.safetensors.index.json").exists() == (files > 1)
    assert (folder / "tokenizer.json").read_text() == '{"of": "the source"}'
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_config_gets_the_precision_of_what_is_written(source: Path, tmp_path: Path) -> None:
    writer = HfWriter(tmp_path / "out", source, [TensorSpec("a", (2,), torch.bfloat16)], 99)
    writer.add("a", torch.ones(2, dtype=torch.bfloat16))
    writer.finish()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert written == {**original, "torch_dtype": "bfloat16"}


def test_an_unfinished_folder_does_not_bear_the_name_and_gives_way(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    HfWriter(folder, source, SPECS, 24).add("a", TENSORS["a"])
    assert not folder.exists()
    writer = HfWriter(folder, source, SPECS, 24)
    with pytest.raises(ValueError, match="a never came"):
        writer.finish()
    writer.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tensor_out_of_turn_is_refused(source: Path, tmp_path: Path) -> None:
    writer = HfWriter(tmp_path / "out", source, SPECS, 24)
    with pytest.raises(ValueError, match="got b"):
        writer.add("b", TENSORS["b"])
    with pytest.raises(ValueError, match="got a"):
        writer.add("a", TENSORS["a"].to(torch.bfloat16))
    writer.discard()


def test_what_came_back_different_from_the_disk_is_caught(source: Path, tmp_path: Path) -> None:
    writer = HfWriter(tmp_path / "out", source, SPECS, 24)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    save_file({"a": torch.zeros(2, 2)}, tmp_path / ".out.partial/model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="a was written as"):
        writer.finish()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_overwritten(source: Path) -> None:
    with pytest.raises(UserError, match="exists already; remove it or name another folder"):
        HfWriter(source, source, SPECS, 24)


def test_a_source_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read config\.json"):
        HfWriter(tmp_path / "out", tmp_path, SPECS, 24)
    assert list(tmp_path.iterdir()) == []
