"""Where the weights lie on a rank of a vLLM engine: fused projections, copied key-value heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.weights.geometry import Box, Region

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from megatron_oreal.models.family import Family, ModelDims, Row

_VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to a multiple of this before it cuts it
_FUSED = {"qkv": ("q_proj", "qkv_proj"), "gate_up": ("gate_proj", "gate_up_proj")}


@dataclass(frozen=True)
class LiveShard:
    """This rank's part of an engine: the parameters it computes with, by vLLM's names.

    `rank` is its place among the `size` tensor-parallel ranks of its engine. Engines fill the world
    in order: world rank r is rank r % size of engine r // size.
    """

    parameters: Mapping[str, torch.Tensor]
    rank: int
    size: int


def vllm_regions(family: Family, dims: ModelDims, rank: int, size: int) -> list[Region]:
    """Returns the regions of a rank among the `size` of one engine; pure.

    Local names are those of vLLM's parameters. Tied embeddings lie under the embedding's name
    alone: vLLM's head shares them.
    """
    regions = []
    for row in family.rows:
        layers = range(dims.layers) if "{i}" in row.megatron[0] else range(1)
        if dims.tied_embeddings and row.hf[0].name == family.output:
            continue
        cuts = _cuts(row, dims, rank, size)
        for layer in layers:
            names = family.hf_names(row, layer, dims)
            key = names[0].replace(*_FUSED[row.kind]) if row.kind in _FUSED else names[0]
            regions += _stacked(key, dict(zip(names, cuts, strict=True)))
    return regions


def vllm_shapes(
    family: Family, dims: ModelDims, rank: int, size: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of a rank of an engine, vocabulary padding too; pure."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in family.rows:
        name = row.hf[0].name
        if row.kind == "vocab" and not (dims.tied_embeddings and name == family.output):
            # By itself: the last ranks may hold padding alone.
            shapes[name] = (_padded_vocab(dims) // size, *dims.shape(row.hf[0].sizes)[1:])
    for region in vllm_regions(family, dims, rank, size):
        known = shapes.get(region.key, region.local.stop)
        shapes[region.key] = tuple(map(max, known, region.local.stop))
    return shapes


def difference(
    live: LiveShard, family: Family, dims: ModelDims, dtypes: Mapping[str, torch.dtype]
) -> str:
    """Says why live parameters cannot be written by this layout, empty where they can; pure.

    They can where there are these parameters and no others, each of the shape that the layout gives
    it, laid out row by row, in the precision of the tensors that it holds.

    Args:
        live: A rank's part of an engine.
        family: The model's family.
        dims: The model's dimensions.
        dtypes: Precision of each Hugging Face tensor on its way.
    """
    place, parameters = (live.rank, live.size), live.parameters
    shapes = vllm_shapes(family, dims, *place)
    for name in sorted(shapes.keys() ^ parameters.keys()):
        return f"{name} is {'missing' if name in shapes else 'no parameter of the layout'}"
    held = {region.key: dtypes[region.tensor] for region in vllm_regions(family, dims, *place)}
    for name, shape in shapes.items():
        parameter, dtype = parameters[name], held.get(name)
        if tuple(parameter.shape) != shape:
            return f"{name} has shape {tuple(parameter.shape)}, not {shape}"
        if not parameter.is_contiguous():
            return f"{name} has strides {parameter.stride()}"
        if dtype not in (None, parameter.dtype):
            return f"{name} is {parameter.dtype}, not {dtype}"
    return ""


def _padded_vocab(dims: ModelDims) -> int:
    return math.ceil(dims.vocab / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def _cuts(row: Row, dims: ModelDims, rank: int, size: int) -> list[Box | None]:
    """Returns the part of each of a row's tensors that the rank holds, None for nothing."""
    shapes = [dims.shape(tensor.sizes) for tensor in row.hf]
    if row.kind == "replicated":
        return [Box.whole(shape) for shape in shapes]
    if row.kind == "row":
        return [_part(shape, 1, rank, shape[1] // size) for shape in shapes]
    if row.kind == "vocab":
        return [_part(shape, 0, rank, _padded_vocab(dims) // size) for shape in shapes]
    if row.kind == "qkv":
        copies = max(1, size // dims.kv_heads)
        query, key, value = shapes
        kv_rows = dims.kv_rows * copies // size
        return [
            _part(query, 0, rank, query[0] // size),
            _part(key, 0, rank // copies, kv_rows),
            _part(value, 0, rank // copies, kv_rows),
        ]
    return [_part(shape, 0, rank, shape[0] // size) for shape in shapes]


def _part(shape: tuple[int, ...], cut: int, number: int, lines: int) -> Box | None:
    """Returns part `number` of a tensor cut into parts of so many lines of dimension `cut`."""
    low, high = number * lines, min((number + 1) * lines, shape[cut])
    if low >= high:
        return None
    start, stop = [0] * len(shape), list(shape)
    start[cut], stop[cut] = low, high
    return Box(tuple(start), tuple(stop))


def _stacked(key: str, parts: dict[str, Box | None]) -> list[Region]:
    """Returns the regions of parts that lie in one parameter, stacked in rows."""
    regions, row = [], 0
    for name, box in parts.items():
        if box is not None:
            to = (row, *(0 for _ in box.start[1:]))
            regions.append(Region(name, box, key, box.moved(box.start, to)))
            row += box.shape[0]
    return regions
