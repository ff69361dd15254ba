"""A checksum of a tensor that shards compute in parts, which add up wherever the cuts are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_oreal.weights.geometry import Box

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements at a time, each of which takes some 32 bytes on the way
_MULTIPLIER = 0x2545F4914F6CDD1D


def tensor_checksum(values: torch.Tensor, box: Box, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the share of `values` in a tensor's checksum: int64, 0-dim, on their device.

    The checksum is the sum over all elements of (their bits as an integer) x (an odd number made
    of their position), modulo 2^64: shares of disjoint boxes add up to it, and one changed
    element always shows. Not collective.

    Args:
        values: The elements of `box`, in its shape.
        box: Where they lie in the tensor.
        shape: The shape of the tensor.
    """
    width = box.shape[-1]
    rows = values.detach().reshape(-1, width)
    starts = _row_starts(box, shape, values.device)
    columns = torch.arange(width, device=values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    step = max(1, _CHUNK // width)
    for first in range(0, rows.shape[0], step):
        bits = rows[first : first + step].contiguous().view(_BITS[values.element_size()])
        positions = starts[first : first + step, None] + columns
        total += (bits.to(torch.int64) * _odd_weights(positions)).sum()
    return total


def _row_starts(box: Box, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Returns the position in the row-major tensor at which each row of the box begins."""
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    for dim, (low, high) in enumerate(zip(box.start[:-1], box.stop[:-1], strict=True)):
        lines = torch.arange(low, high, device=device)
        starts = ((starts * shape[dim])[:, None] + lines).reshape(-1)
    return starts * shape[-1] + box.start[-1]


def _odd_weights(positions: torch.Tensor) -> torch.Tensor:
    mixed = positions * _MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * _MULTIPLIER
    return mixed | 1
