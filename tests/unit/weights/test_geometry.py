"""Boxes: every element is where it should be, counted one by one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.weights.geometry import Box, Region, boxes_of_range, check_cover


@st.composite
def boxes(draw: st.DrawFn, dims: int = 2) -> Box:
    start = tuple(draw(st.integers(0, 4)) for _ in range(dims))
    return Box(start, tuple(low + draw(st.integers(1, 4)) for low in start))


def elements(box: Box | None) -> set[tuple[int, ...]]:
    if box is None:
        return set()
    return set(itertools.product(*map(range, box.start, box.stop)))


@given(boxes(), boxes())
def test_intersection_is_what_both_have(first: Box, second: Box) -> None:
    assert elements(first.intersect(second)) == elements(first) & elements(second)
    assert first.intersect(second) == second.intersect(first)


@given(boxes(3), boxes(3))
def test_subtraction_leaves_the_rest_in_disjoint_parts(first: Box, second: Box) -> None:
    parts = [elements(part) for part in first.subtract(second)]
    assert set().union(*parts) == elements(first) - elements(second)
    assert sum(map(len, parts)) == len(elements(first) - elements(second))


@given(boxes())
def test_moving_there_and_back(box: Box) -> None:
    moved = box.moved((0, 0), (3, 5))
    assert moved.shape == box.shape
    assert moved.moved((3, 5), (0, 0)) == box


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_boxes_of_a_range_hold_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    everything = list(itertools.product(*map(range, shape)))
    start = data.draw(st.integers(0, len(everything) - 1))
    stop = data.draw(st.integers(start + 1, len(everything)))
    found = boxes_of_range(tuple(shape), start, stop)
    assert [e for box in found for e in sorted(elements(box))] == everything[start:stop]


def test_a_range_outside_of_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="not a range"):
        boxes_of_range((2, 3), 5, 7)


def test_narrowing_a_region_moves_its_local_box_along() -> None:
    region = Region("q", Box((10, 0), (14, 8)), "qkv", Box((0, 0), (4, 8)))
    assert region.narrow(Box((12, 2), (14, 4))).local == Box((2, 2), (4, 4))
    with pytest.raises(ValueError, match="does not lie within"):
        region.narrow(Box((9, 0), (11, 8)))


@pytest.mark.parametrize(
    ("start", "stop"), [((0,), (0,)), ((2,), (1,)), ((-1,), (1,)), ((0,), (1, 2))]
)
def test_an_empty_or_crooked_box_is_refused(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a box"):
        Box(start, stop)


def test_a_region_of_unequal_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        Region("q", Box.whole((2, 3)), "qkv", Box.whole((3, 2)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Box((0,), (3,))], "cover 3 of 4"),
        ([Box((0,), (3,)), Box((2,), (3,))], "some twice"),
        ([Box((0,), (3,)), Box((4,), (5,))], "1 reach outside"),
    ],
)
def test_a_wrong_cover_is_named(parts: list[Box], message: str) -> None:
    check_cover("fc1", [Box((0,), (3,)), Box((3,), (4,))], Box.whole((4,)))
    with pytest.raises(ValueError, match=f"fc1.*{message}"):
        check_cover("fc1", parts, Box.whole((4,)))
