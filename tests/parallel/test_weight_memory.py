"""Memory of import, export and conversion of a gigabyte, sampled every 10 ms from outside."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.weights.bridge import export_hf, load_hf, open_stream
from megatron_oreal.weights.cluster import MegatronLayout
from megatron_oreal.weights.convert import Rate, convert_to_hf, convert_to_megatron
from megatron_oreal.weights.layout import MegatronPlace
from tests.ranks import RankPool
from tests.toy_models import CONFIG_JSON, TOYS

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.timeout(1800)]

MIB = 1 << 20
ROUND = 64 * MIB
SHARD = 256 * MIB  # of one embedding of the two, which take four rounds each
INTERVAL_S = 0.01
LAYOUT = ParallelConfig(tensor=2)
MODEL = {
    **CONFIG_JSON,
    **TOYS["llama"],
    "num_hidden_layers": 3,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
}
HELD: dict[str, torch.Tensor] = {}  # a rank's model, from one call to the next


def write_random(folder: Path) -> int:
    """Writes the model in fp32 and returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    family, dims = read_model(folder)
    tensors = {name: torch.rand(shape) for name, shape in family.tensors(dims).items()}
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def load(folder: Path) -> int:
    """Loads this rank's part and returns its bytes."""
    family, dims = read_model(folder)
    rank = topology.current().tp_rank
    shapes = MegatronLayout(family, dims, 2, LAYOUT).shapes(0)
    HELD.update({name: torch.empty(shape) for name, shape in shapes.items()})
    load_hf(HELD, folder, family, dims, MegatronPlace(rank, 2))
    return sum(param.nbytes for param in HELD.values())


def export(folder: Path, out: Path) -> None:
    family, dims = read_model(folder)
    place = MegatronPlace(topology.current().tp_rank, 2)
    stream = open_stream(HELD, family, dims, place, round_bytes=ROUND, receivers=[0])
    export_hf(stream, out, source=folder, shard_bytes=SHARD)


def forget() -> None:
    HELD.clear()


def cut(source: Path, out: Path) -> None:
    convert_to_megatron(source, out, LAYOUT, rate=Rate(lambda _: None))


def join(source: Path, out: Path) -> None:
    convert_to_hf(source, out, shard_bytes=SHARD, rate=Rate(lambda _: None))


def anonymous_bytes(pid: int) -> int:
    """What a process holds beyond the pages of mapped files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("this kernel does not tell RssAnon")


@contextmanager
def growth(pids: list[int]) -> Iterator[list[int]]:
    """Fills in by how many bytes each process has grown at most, once the block has ended."""
    before = [anonymous_bytes(pid) for pid in pids]
    most, ended = list(before), threading.Event()

    def sample() -> None:
        while not ended.wait(INTERVAL_S):
            most[:] = map(max, most, map(anonymous_bytes, pids))

    sampler = threading.Thread(target=sample)
    sampler.start()
    found: list[int] = []
    try:
        yield found
    finally:
        ended.set()
        sampler.join()
    found[:] = [high - low for high, low in zip(most, before, strict=True)]


def test_memory_is_bounded_by_shares_shards_and_rounds(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "hf"
    assert write_random(folder) > 1000 * MIB
    with closing(RankPool(2)) as pool:
        pids = pool.run(os.getpid, tp=2)
        with growth(pids) as loading:
            shares = pool.run(load, folder, tp=2)
        with growth(pids) as exporting:
            pool.run(export, folder, tmp_path / "out", tp=2)
        pool.run(forget)
        with growth(pids) as cutting:
            pool.run(cut, folder, tmp_path / "cut", tp=2)
        with growth(pids) as joining:
            pool.run(join, tmp_path / "cut", tmp_path / "back", tp=2)
    grown = {"load": loading, "export": exporting, "cut": cutting, "join": joining}
    record_property("shares", shares)
    record_property("grown", grown)
    assert all(grown <= share + ROUND for grown, share in zip(loading, shares, strict=True))
    assert exporting[0] <= SHARD + 2 * ROUND
    assert exporting[1] <= 2 * ROUND
    assert all(grown <= share + ROUND for grown, share in zip(cutting, shares, strict=True))
    assert max(joining) <= SHARD + 2 * ROUND
