"""A trained model as boxes of Hugging Face tensors: what a rank writes, any layout reads.

Each rank writes the boxes that it owns, so that every element is in the checkpoint once: the
weights in the optimizer's own fp32 and, once it has taken a step, its two moments. There is no
other state: activations draw nothing at random. A file is plain safetensors; an entry is called
`<weight | exp_avg | exp_avg_sq>/<Hugging Face name>/<where the box begins, comma-separated>`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import msgspec
import torch
from safetensors import safe_open

from megatron_oreal.checkpoint.snapshot import Snapshot
from megatron_oreal.engine.megatron_model import MegatronModel
from megatron_oreal.engine.optimizer_state import MOMENTS, OptimizerShard
from megatron_oreal.parallel.collectives import all_gather_bytes, world_rank
from megatron_oreal.weights.geometry import Box, Region, boxes_of_range
from megatron_oreal.weights.plan import TensorSpec, owned_regions
from megatron_oreal.weights.sharded import Piece, entry_of, read_box

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredModel:
    """A model with an optimizer, and where this rank's parameters lie among whole tensors.

    Args:
        model: the live model.
        shapes: of every Hugging Face tensor that the model is made of.
        regions: of this rank's parameters.
    """

    model: MegatronModel
    shapes: Shapes
    regions: Sequence[Region]

    @cached_property
    def _by_parameter(self) -> dict[str, list[Region]]:
        found: dict[str, list[Region]] = {name: [] for name in self.model.parameters()}
        for region in self.regions:
            found[region.key].append(region)
        return found

    @cached_property
    def _owned(self) -> dict[str, list[Region]]:
        """What this rank writes, by parameter; collective over the world the first time."""
        held = [
            region
            for name, shard in self.model.optimizer_shards().items()
            for region in self.regions_of(name, shard)
        ]
        payloads = all_gather_bytes(msgspec.msgpack.encode(held))
        sources = [msgspec.msgpack.decode(payload, type=list[Region]) for payload in payloads]
        specs = [TensorSpec(name, shape, torch.float32) for name, shape in self.shapes.items()]
        owned: defaultdict[str, list[Region]] = defaultdict(list)
        for region in owned_regions(specs, sources)[world_rank()]:
            owned[region.key].append(region)
        return owned

    @cached_property
    def _memory(self) -> torch.Tensor:
        """Host memory for weights and moments of what this rank owns, taken once."""
        elements = sum(region.box.size for owned in self._owned.values() for region in owned)
        on_gpu = any(tensor.is_cuda for tensor in self.model.parameters().values())
        memory = torch.empty((1 + len(MOMENTS)) * elements, pin_memory=on_gpu)
        return memory.zero_()  # else the first checkpoint would wait for every page of it

    @cached_property
    def _strides(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters in row-major order, which shards are flattened in."""
        parameters = self.model.parameters()
        return {n: torch.empty(p.shape, device="meta").stride() for n, p in parameters.items()}

    def prepare(self) -> None:
        """Agrees on who writes what and takes the memory for it; collective over the world.

        To be called before `snapshot`; again, it does nothing.
        """
        _ = self._memory, self._strides

    def snapshot(self) -> Snapshot:
        """Copies what this rank owns to host memory, which the next call overwrites.

        Not collective after `prepare`.
        """
        copied, start = {}, 0
        with self.model.awake():
            for name, shard in self.model.optimizer_shards().items():
                for state, values in shard.tensors.items():
                    for region in self._owned[name]:
                        stop = start + region.box.size
                        copy = self._memory[start:stop].view(region.box.shape)
                        copy.copy_(self._view(name, shard, values, region), non_blocking=True)
                        copied[_entry(state, region)], start = copy, stop
            if self._memory.is_pinned():
                torch.cuda.synchronize()
        return Snapshot(copied, self.model.steps_taken())

    def read(self, files: Sequence[Path], steps: int) -> None:
        """Fills model and optimizer, which has taken no step, from files of any layout.

        Not collective. Vocabulary padding, which no file has, is zero.

        Raises:
            ValueError: The files lack a box.
        """
        with TensorFiles(files) as stored, torch.no_grad(), self.model.awake():
            for name, parameter in self.model.parameters().items():
                parameter.copy_(_assemble(stored, "weight", parameter, self._by_parameter[name]))
            self.model.set_steps_taken(steps)
            for name, shard in self.model.optimizer_shards().items():
                regions = self.regions_of(name, shard)
                parameter = self.model.parameters()[name]
                for state, values in shard.tensors.items():
                    whole = _assemble(stored, state, parameter, regions)
                    values.copy_(whole.view(-1)[shard.start : shard.start + len(values)])

    def regions_of(self, name: str, shard: OptimizerShard) -> list[Region]:
        """Returns a parameter's regions as far as they lie in this shard of it; not collective."""
        shape = tuple(self.model.parameters()[name].shape)
        stop = shard.start + len(shard.tensors["weight"])
        return [
            region.narrow(common.moved(region.local.start, region.box.start))
            for box in boxes_of_range(shape, shard.start, stop)
            for region in self._by_parameter[name]
            if (common := region.local.intersect(box))
        ]

    def _view(
        self, name: str, shard: OptimizerShard, values: torch.Tensor, region: Region
    ) -> torch.Tensor:
        """Returns the values of a region, which lies within the shard, in its shape."""
        strides = self._strides[name]
        first = sum(at * by for at, by in zip(region.local.start, strides, strict=True))
        return values.as_strided(
            region.local.shape, strides, values.storage_offset() + first - shard.start
        )


class TensorFiles:
    """The tensors of one model in a checkpoint, opened lazily; a context manager."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._open = ExitStack()
        self._pieces: defaultdict[tuple[str, str], list[Piece]] = defaultdict(list)
        with ExitStack() as on_failure:
            on_failure.enter_context(self._open)
            for path in files:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                for key in file.keys():  # noqa: SIM118  no dict
                    state, tensor, box = _parse_entry(key, file.get_slice(key).get_shape())
                    self._pieces[state, tensor].append(Piece(box, file, key))
            on_failure.pop_all()

    def __enter__(self) -> Self:
        """Returns the open files."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self._open.close()

    def read(self, state: str, tensor: str, box: Box) -> torch.Tensor:
        """Returns a box of a whole tensor, on the CPU, fp32.

        Raises:
            ValueError: The files lack a part of it.
        """
        try:
            return read_box(self._pieces[state, tensor], box, torch.float32)
        except ValueError as error:
            raise ValueError(f"{state} of {tensor}: {error}") from error


def _assemble(
    stored: TensorFiles, state: str, parameter: torch.Tensor, regions: Sequence[Region]
) -> torch.Tensor:
    whole = torch.zeros(parameter.shape)
    for region in regions:
        whole[region.local.slices] = stored.read(state, region.tensor, region.box)
    return whole


def _entry(state: str, region: Region) -> str:
    return f"{state}/{entry_of(region.tensor, region.box.start)}"


def _parse_entry(key: str, shape: Sequence[int]) -> tuple[str, str, Box]:
    state, tensor, begin = key.split("/")
    start = tuple(map(int, begin.split(",")))
    return state, tensor, Box(start, tuple(map(sum, zip(start, shape, strict=True))))
