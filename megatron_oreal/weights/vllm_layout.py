"""Where the weights lie on a rank of a vLLM engine: fused projections, copied key-value heads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_oreal.weights.geometry import Box, Region

if TYPE_CHECKING:
    from megatron_oreal.models.family import Family, ModelDims, Row

_VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to a multiple of this before it cuts it
_FUSED = {"qkv": ("q_proj", "qkv_proj"), "gate_up": ("gate_proj", "gate_up_proj")}


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


def _cuts(row: Row, dims: ModelDims, rank: int, size: int) -> list[Box | None]:
    """Returns the part of each of a row's tensors that the rank holds, None for nothing."""
    shapes = [dims.shape(tensor.sizes) for tensor in row.hf]
    if row.kind == "replicated":
        return [Box.whole(shape) for shape in shapes]
    if row.kind == "row":
        return [_part(shape, 1, rank, shape[1] // size) for shape in shapes]
    if row.kind == "vocab":
        padded = math.ceil(dims.vocab / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
        return [_part(shape, 0, rank, padded // size) for shape in shapes]
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
