"""From any folder of weights to any other: Hugging Face, or the files of a Megatron layout.

Nothing is computed: boxes are read and written, then read again and compared bit for bit, and only
a folder that is whole gets its name. The ranks of the world share the files out among them.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, ParallelConfig
from megatron_oreal.config.validate import check_model
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import (
    agree,
    barrier,
    start_world,
    stop_world,
    world_rank,
    world_size,
)
from megatron_oreal.weights.cluster import MegatronLayout
from megatron_oreal.weights.geometry import Box
from megatron_oreal.weights.hf_io import (
    HfWriter,
    copy_side_files,
    give_name,
    open_partial,
    partial_of,
    refuse_existing,
    sync_to_disk,
    write_json,
)
from megatron_oreal.weights.plan import TensorSpec, owned_regions
from megatron_oreal.weights.sharded import (
    MANIFEST,
    Manifest,
    ShardedCheckpoint,
    Store,
    StoredBox,
    StoredTensor,
    open_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from megatron_oreal.models.family import Family, ModelDims

_MIB = 1 << 20


@dataclass
class Rate:
    """Tells how far a conversion is; `say` gets one line a file of this rank."""

    say: Callable[[str], None]
    total: int = 0
    _done: int = 0
    _started: float = field(default_factory=monotonic)

    def count(self, file: str, nbytes: int) -> None:
        """Takes that a file of so many bytes is written and read back."""
        self._done += nbytes
        speed = self._done / _MIB / max(monotonic() - self._started, 1e-9)
        share = self._done / max(self.total, 1)
        self.say(f"{file}: {share:.0%} of {self.total / _MIB:,.1f} MiB, {speed:,.0f} MiB/s")


def run_tool(name: str, convert: Callable[[Rate], None]) -> int:
    """Joins the world, converts, leaves it, and returns the exit status of the program `name`.

    A user's mistake is a line on rank 0 and status 2 on all ranks.
    """
    start_world()
    rank = world_rank()
    try:
        convert(Rate(say=lambda line: print(f"[{rank}] {line}", flush=True)))  # noqa: T201  a tool
    except UserError as error:
        if rank == 0:
            print(f"{name}: {error}", file=sys.stderr)  # noqa: T201  a tool
        return 2
    finally:
        stop_world()
    return 0


def convert_to_megatron(
    source: str | Path, out: str | Path, parallel: ParallelConfig, *, rate: Rate
) -> None:
    """Writes weights of either kind as the ranks of a layout hold them; collective over the world.

    Raises:
        UserError: On every rank: the source is no whole checkpoint of a known family, the layout
            cannot cut it, the output exists or the file system refuses.
    """
    out = Path(out)
    partial = partial_of(out)
    with contextlib.ExitStack() as stack:
        with _discarded_on_failure(partial), agree(), _as_user_error(out):
            family, dims = read_model(source)
            store = stack.enter_context(open_store(source))
            specs = _audited(store, family, dims)
            parts = _cut(family, dims, specs, parallel)
            if world_rank() == 0:
                refuse_existing(out)
                open_partial(out)
                copy_side_files(source, partial)
                manifest = Manifest(parallel.tensor, parallel.pipeline, _described(specs), parts)
                write_json(partial / MANIFEST, manifest)
        mine = list(parts.items())[world_rank() :: world_size()]
        by_name = {spec.name: spec for spec in specs}
        rate.total = sum(_bytes_of(boxes, by_name) for _, boxes in mine)
        with _discarded_on_failure(partial), agree(), _as_user_error(out):
            for file, boxes in mine:
                _write_part(store, partial / file, boxes)
                rate.count(file, _bytes_of(boxes, by_name))
    with _discarded_on_failure(partial), agree(), _as_user_error(out):
        if world_rank() == 0:
            with ShardedCheckpoint(partial) as written:
                written.audit(family.tensors(dims))
            give_name(out)
    barrier()


def convert_to_hf(source: str | Path, out: str | Path, *, shard_bytes: int, rate: Rate) -> None:
    """Writes weights of either kind as a Hugging Face folder; collective over the world.

    Raises:
        UserError: On every rank: the source is no whole checkpoint of a known family, the output
            exists or the file system refuses.
    """
    with contextlib.ExitStack() as stack:
        with agree(), _as_user_error(out):
            family, dims = read_model(source)
            store = stack.enter_context(open_store(source))
            specs = _audited(store, family, dims)
            writer = HfWriter(out, source, specs, shard_bytes, prepare=world_rank() == 0)
        mine = range(len(writer.shards))[world_rank() :: world_size()]
        rate.total = sum(spec.nbytes for number in mine for spec in writer.shards[number])
        with _discarded_on_failure(writer.partial), agree(), _as_user_error(out):
            for number in mine:
                path = _write_shard(store, writer, number)
                rate.count(path.name, sum(spec.nbytes for spec in writer.shards[number]))
    with _discarded_on_failure(writer.partial), agree(), _as_user_error(out):
        if world_rank() == 0:
            writer.finish()
    barrier()


def _audited(store: Store, family: Family, dims: ModelDims) -> list[TensorSpec]:
    shapes = family.tensors(dims)
    store.audit(shapes, frozenset({family.output} if dims.tied_embeddings else ()))
    return [store.spec(name) for name in shapes]


def _cut(
    family: Family, dims: ModelDims, specs: Sequence[TensorSpec], parallel: ParallelConfig
) -> dict[str, list[StoredBox]]:
    """Returns the boxes of each rank's file."""
    check_model(Config(parallel=parallel), dims)
    ranks = parallel.tensor * parallel.pipeline
    stores = MegatronLayout(family, dims, ranks, parallel).stores
    return {
        f"rank-{rank:05d}-of-{ranks:05d}.safetensors": [
            StoredBox(region.tensor, region.box.start, region.box.stop) for region in regions
        ]
        for rank, regions in enumerate(owned_regions(specs, stores))
    }


def _described(specs: Sequence[TensorSpec]) -> dict[str, StoredTensor]:
    return {
        spec.name: msgspec.convert(
            {"shape": spec.shape, "dtype": str(spec.dtype).removeprefix("torch.")}, StoredTensor
        )
        for spec in specs
    }


def _write_shard(store: Store, writer: HfWriter, number: int) -> Path:
    tensors = {
        spec.name: store.read(spec.name, Box.whole(spec.shape)) for spec in writer.shards[number]
    }
    path = writer.write_shard(number, tensors)
    _compare(path, tensors)
    return path


def _write_part(store: Store, path: Path, boxes: Sequence[StoredBox]) -> None:
    tensors = {
        stored.entry: store.read(stored.tensor, Box(stored.start, stored.stop)).contiguous()
        for stored in boxes
    }
    save_file(tensors, path, metadata={"format": "pt"})
    sync_to_disk(path)
    _compare(path, tensors)


def _compare(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Reads a file back and compares it bit for bit."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name).view(torch.uint8), tensor.view(torch.uint8)):
                raise UserError(f"{path}: {name} came back changed from the disk; check the disk")


def _bytes_of(boxes: Sequence[StoredBox], specs: Mapping[str, TensorSpec]) -> int:
    return sum(
        math.prod(high - low for low, high in zip(box.start, box.stop, strict=True))
        * specs[box.tensor].dtype.itemsize
        for box in boxes
    )


@contextmanager
def _as_user_error(out: str | Path) -> Iterator[None]:
    """Names the output where the file system, or safetensors on it, refuses."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {out}: {error}; name a folder that can be written"
        ) from error


@contextmanager
def _discarded_on_failure(partial: Path) -> Iterator[None]:
    """Removes what has been written where the ranks agree to give up."""
    try:
        yield
    except UserError:
        if world_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
