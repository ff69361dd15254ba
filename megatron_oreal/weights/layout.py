"""Where the weights lie: the regions of a Megatron rank and of a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.weights.geometry import Box, Region, check_cover

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_oreal.models.family import Family, Kind, ModelDims


@dataclass(frozen=True)
class MegatronPlace:
    """Where a rank's part of a model stands; its layer 0 is the model's layer `layer_offset`."""

    tensor_rank: int = 0
    tensor_size: int = 1
    layer_offset: int = 0


@dataclass(frozen=True, slots=True)
class _Span:
    """`length` lines of tensor number `tensor` from `start` are the fused ones from `fused`."""

    tensor: int
    start: int
    fused: int
    length: int


def hf_regions(shapes: Mapping[str, tuple[int, ...]]) -> list[Region]:
    """Returns the regions of a store of whole tensors: one each, under its own name."""
    return [
        Region(name, Box.whole(shape), name, Box.whole(shape)) for name, shape in shapes.items()
    ]


def megatron_regions(
    family: Family,
    dims: ModelDims,
    local_shapes: Mapping[str, tuple[int, ...]],
    place: MegatronPlace,
) -> list[Region]:
    """Returns the regions of a Megatron rank's parameters; pure.

    Args:
        family: The model's family.
        dims: The model's dimensions.
        local_shapes: Shape of each parameter by its name in `GPTModel.named_parameters()`; their
            names decide which part of the model the rank holds.
        place: The rank's coordinates.

    Raises:
        ValueError: A parameter is not in the family's table, has another shape than its place in
            the layout asks for, or is not covered exactly once outside its vocabulary padding.
    """
    shapes = family.tensors(dims)
    regions = []
    for key, local_shape in local_shapes.items():
        try:
            row, layer = family.find(key)
        except KeyError as error:
            raise ValueError(f"{key}: no parameter of the {family.name} family") from error
        names = family.hf_names(row, layer + place.layer_offset, dims)
        absent = [name for name in names if name not in shapes]
        if absent:
            raise ValueError(f"{key}: a {family.name} of {dims.layers} layers has no {absent[0]}")
        tensors = {name: shapes[name] for name in names}
        regions += _parameter_regions(key, local_shape, row.kind, tensors, dims=dims, place=place)
    return regions


def _parameter_regions(
    key: str,
    local_shape: tuple[int, ...],
    kind: Kind,
    tensors: Mapping[str, tuple[int, ...]],
    *,
    dims: ModelDims,
    place: MegatronPlace,
) -> list[Region]:
    """Returns where one parameter's elements lie in its Hugging Face `tensors`."""
    cut = 1 if kind == "row" else 0
    names, shapes = list(tensors), list(tensors.values())
    _check_shape(key, local_shape, kind, shapes, cut=cut, tensor_size=place.tensor_size)
    low = 0 if kind == "replicated" else place.tensor_rank * local_shape[cut]
    high = low + local_shape[cut]
    regions = []
    for span in _spans(kind, [shape[cut] for shape in shapes], dims, place.tensor_size):
        first, last = max(low, span.fused), min(high, span.fused + span.length)
        if first < last:
            start = span.start + first - span.fused
            box = _lines(shapes[span.tensor], cut, start, start + last - first)
            local = _lines(local_shape, cut, first - low, last - low)
            regions.append(Region(names[span.tensor], box, key, local))
    real = min(high, sum(shape[cut] for shape in shapes)) - low
    within = _lines(local_shape, cut, 0, real) if real > 0 else None
    check_cover(key, [region.local for region in regions], within)
    return regions


def _lines(shape: tuple[int, ...], cut: int, start: int, stop: int) -> Box:
    """Returns the box that is whole but in dimension `cut`."""
    whole = Box.whole(shape)
    return Box(
        (*whole.start[:cut], start, *whole.start[cut + 1 :]),
        (*whole.stop[:cut], stop, *whole.stop[cut + 1 :]),
    )


def _check_shape(
    key: str,
    local_shape: tuple[int, ...],
    kind: Kind,
    shapes: list[tuple[int, ...]],
    *,
    cut: int,
    tensor_size: int,
) -> None:
    total = sum(shape[cut] for shape in shapes)
    ranks = 1 if kind == "replicated" else tensor_size
    other_dims = [(*shape[:cut], *shape[cut + 1 :]) for shape in shapes]
    same_others = all(
        other == (*local_shape[:cut], *local_shape[cut + 1 :]) for other in other_dims
    )
    lines = local_shape[cut] * ranks if len(local_shape) > cut else 0
    fits = lines == total or (kind == "vocab" and lines > total)
    halves_cut = kind != "gate_up" or all(shape[cut] % ranks == 0 for shape in shapes)
    if not (same_others and fits and halves_cut):
        raise ValueError(
            f"{key}: local shape {local_shape} at tensor-parallel size {tensor_size} does "
            f"not fit Hugging Face {shapes} ({kind})"
        )


def _spans(kind: Kind, heights: list[int], dims: ModelDims, tensor_size: int) -> list[_Span]:
    """Returns how the lines of the Hugging Face tensors follow each other in the fused parameter.

    The fused parameter is what the ranks of a tensor-parallel group hold, one after the other.
    """
    if kind == "qkv":
        # Megatron: [KV group: its queries, key, value]. A rank's range may begin or end in a group.
        queries = heights[0] // dims.kv_heads
        group = queries + 2 * dims.head_dim
        return [
            span
            for g in range(dims.kv_heads)
            for span in (
                _Span(0, g * queries, g * group, queries),
                _Span(1, g * dims.head_dim, g * group + queries, dims.head_dim),
                _Span(2, g * dims.head_dim, (g + 1) * group - dims.head_dim, dims.head_dim),
            )
        ]
    if kind == "gate_up":
        part = heights[0] // tensor_size
        return [
            _Span(half, rank * part, (2 * rank + half) * part, part)
            for rank in range(tensor_size)
            for half in (0, 1)
        ]
    return [_Span(0, 0, 0, heights[0])]
