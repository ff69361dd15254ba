"""Checksums: shares add up, whatever changes shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.weights import checksum
from megatron_oreal.weights.checksum import tensor_checksum
from megatron_oreal.weights.geometry import Box


def total(values: torch.Tensor) -> int:
    shape = tuple(values.shape)
    return int(tensor_checksum(values, Box.whole(shape), shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(row=st.integers(1, 5), column=st.integers(1, 6))
def test_shares_of_disjoint_boxes_add_up(dtype: torch.dtype, row: int, column: int) -> None:
    shape = (6, 7)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    boxes = [
        Box((0, 0), (row, column)),
        Box((0, column), (row, 7)),
        Box((row, 0), (6, column)),
        Box((row, column), (6, 7)),
    ]
    shares = sum(tensor_checksum(values[box.slices], box, shape) for box in boxes)
    assert int(shares) == total(values)


def test_the_sum_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    expected = total(values)
    monkeypatch.setattr(checksum, "_CHUNK", 8)
    assert total(values) == expected


@given(position=st.integers(0, 11), bit=st.integers(0, 31))
def test_one_flipped_bit_shows(position: int, bit: int) -> None:
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    flipped = values.clone()
    mask = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    flipped.view(torch.int32).view(-1)[position] ^= mask
    assert total(flipped) != total(values)


def test_exchanged_elements_rows_and_signs_of_zero_show() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    others = [
        values.flip(0),
        values.flip(1),
        values.T.contiguous(),
        values * torch.tensor([1.0, -1.0]),
    ]
    assert len({total(other) for other in [values, *others]}) == 5


def test_a_vector_has_one_too() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    first, rest = Box((0,), (1,)), Box((1,), (3,))
    shares = tensor_checksum(values[:1], first, (3,)) + tensor_checksum(values[1:], rest, (3,))
    assert int(shares) == total(values)
