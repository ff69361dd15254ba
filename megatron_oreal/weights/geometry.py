"""Boxes of tensors, and regions: a box of a Hugging Face tensor that is a box of a local one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The elements from `start` up to `stop` in each dimension; never empty."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuses an empty box, so that none needs a special case later."""
        if len(self.start) != len(self.stop) or any(
            not 0 <= low < high for low, high in zip(self.start, self.stop, strict=True)
        ):
            raise ValueError(f"not a box: {self.start} to {self.stop}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Self:
        """Returns the box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length in each dimension."""
        return tuple(high - low for low, high in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that cuts this box out of a tensor."""
        return tuple(slice(low, high) for low, high in zip(self.start, self.stop, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Returns the elements that both boxes have, None where there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(low >= high for low, high in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def subtract(self, other: Box) -> list[Box]:
        """Returns disjoint boxes that hold what this box has and the other has not."""
        common = self.intersect(other)
        if common is None:
            return [self]
        parts = []
        start, stop = list(self.start), list(self.stop)
        for dim in range(len(start)):
            if start[dim] < common.start[dim]:
                below = (*stop[:dim], common.start[dim], *stop[dim + 1 :])
                parts.append(Box(tuple(start), below))
                start[dim] = common.start[dim]
            if common.stop[dim] < stop[dim]:
                above = (*start[:dim], common.stop[dim], *start[dim + 1 :])
                parts.append(Box(above, tuple(stop)))
                stop[dim] = common.stop[dim]
        return parts

    def part(self, number: int, count: int) -> Box | None:
        """Returns part `number` of `count` nearly equal ones, cut in dimension 0; None if empty."""
        lines = self.shape[0]
        low, high = (self.start[0] + at * lines // count for at in (number, number + 1))
        return Box((low, *self.start[1:]), (high, *self.stop[1:])) if low < high else None

    def moved(self, origin: tuple[int, ...], to: tuple[int, ...]) -> Box:
        """Returns the box as it lies once `origin` has come to lie at `to`."""
        shift = [there - here for here, there in zip(origin, to, strict=True)]
        return Box(
            tuple(low + by for low, by in zip(self.start, shift, strict=True)),
            tuple(high + by for high, by in zip(self.stop, shift, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class Region:
    """`box` of the Hugging Face tensor `tensor` is `local` of the local tensor `key`."""

    tensor: str
    box: Box
    key: str
    local: Box

    def __post_init__(self) -> None:
        """Refuses boxes of different shapes."""
        if self.box.shape != self.local.shape:
            raise ValueError(f"{self.tensor}: {self.box} and {self.local} differ in shape")

    def narrow(self, box: Box) -> Region:
        """Returns the part of the region for `box`, which must lie within `self.box`."""
        if self.box.intersect(box) != box:
            raise ValueError(f"{self.tensor}: {box} does not lie within {self.box}")
        return Region(self.tensor, box, self.key, box.moved(self.box.start, self.local.start))


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Returns disjoint boxes that hold the elements from `start` up to `stop` in row-major order.

    Raises:
        ValueError: There are none, or not that many.
    """
    if not 0 <= start < stop <= math.prod(shape):
        raise ValueError(f"not a range of {shape}: {start} to {stop}")
    if len(shape) == 1:
        return [Box((start,), (stop,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        return _boxes_of_row(shape, last, start - last * row, stop - last * row)
    boxes = [Box((first, *(0 for _ in shape[1:])), (last, *shape[1:]))] if first < last else []
    if start < first * row:
        boxes = _boxes_of_row(shape, first - 1, start - (first - 1) * row, row) + boxes
    if last * row < stop:
        boxes += _boxes_of_row(shape, last, 0, stop - last * row)
    return boxes


def _boxes_of_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [
        Box((row, *box.start), (row + 1, *box.stop))
        for box in boxes_of_range(shape[1:], start, stop)
    ]


def check_cover(name: str, boxes: list[Box], within: Box | None) -> None:
    """Checks that `boxes` cover each element of `within` (None: nothing) once and no other.

    Raises:
        ValueError: They overlap, leave a gap or reach outside; names the tensor.
    """
    total = within.size if within else 0
    covered = sum(box.size for box in boxes)
    outside = [box for box in boxes if within is None or within.intersect(box) != box]
    overlap = any(
        boxes[first].intersect(second)
        for first in range(len(boxes))
        for second in boxes[first + 1 :]
    )
    if covered != total or outside or overlap:
        raise ValueError(
            f"{name}: regions cover {covered} of {total} elements"
            + (", some twice" if overlap else "")
            + (f", {len(outside)} reach outside" if outside else "")
        )
