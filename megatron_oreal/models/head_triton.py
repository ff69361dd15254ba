"""The passes of `head_passes.py` as Triton kernels: logits are read once, then overwritten once.

Both load any precision and reckon in fp32. Importing this needs triton.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]  comes with a GPU's torch
import triton.language as tl  # pyright: ignore[reportMissingImports]

from megatron_oreal.models.head_passes import FLOOR, Passes

_BLOCK = 4096  # logits of a row at a time
_WARPS = 8


@triton.jit
def _statistics_kernel(  # noqa: PLR0917
    logits,
    columns,
    found,
    tokens,
    words,
    stride,
    floor,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A program walks along one row; its sums follow the highest logit met so far."""
    row = tl.program_id(0)
    first = logits + row.to(tl.int64) * stride
    highest = floor
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(first + at, mask=at < words, other=floor).to(tl.float32)
        above = tl.maximum(highest, tl.max(x, axis=0))
        drop = highest - above
        shrink = tl.exp(drop)
        weight = tl.exp(x - above)
        weighted = (weighted + total * drop) * shrink + weight * (x - above)
        total = total * shrink + weight
        highest = above
    column = tl.load(columns + row)
    target = tl.load(first + column, mask=column >= 0, other=0.0).to(tl.float32)
    tl.store(found + row, highest)
    tl.store(found + tokens + row, tl.sum(total, axis=0))
    tl.store(found + 2 * tokens + row, tl.sum(weighted, axis=0))
    tl.store(found + 3 * tokens + row, target)


@triton.jit
def _gradient_kernel(  # noqa: PLR0917
    logits,
    columns,
    log_total,
    slope,
    out,
    words,
    stride,
    out_stride,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A program has one block of one row, and reads it before it writes it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + at, mask=at < words, other=0.0).to(tl.float32)
    probability = tl.exp(x - tl.load(log_total + row))
    chosen = tl.where(at == tl.load(columns + row), 1.0, 0.0)
    value = tl.load(slope + row) * (chosen - probability)
    tl.store(out + row * out_stride + at, value.to(out.dtype.element_ty), mask=at < words)


def statistics(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """As `head_passes.statistics`."""
    tokens, words = logits.shape
    found = logits.new_empty(4, tokens, dtype=torch.float32)
    grid, block = (tokens,), _block(words)
    _statistics_kernel[grid](  # pyright: ignore[reportIndexIssue]
        logits,
        columns,
        found,
        tokens,
        words,
        logits.stride(0),
        FLOOR,
        BLOCK=block,
        num_warps=_WARPS,
    )
    return found


def gradient(
    logits: torch.Tensor,
    columns: torch.Tensor,
    log_total: torch.Tensor,
    slope: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As `head_passes.gradient`."""
    tokens, words = logits.shape
    if not words:
        return
    block = _block(words)
    grid = (tokens, triton.cdiv(words, block))
    strides = (logits.stride(0), out.stride(0))
    slope = slope.contiguous()  # of a sum alone autograd returns one number, spread by its strides
    _gradient_kernel[grid](  # pyright: ignore[reportIndexIssue]
        logits, columns, log_total, slope, out, words, *strides, BLOCK=block, num_warps=_WARPS
    )


def _block(words: int) -> int:
    return min(_BLOCK, max(128, triton.next_power_of_2(words)))


PASSES = Passes(statistics, gradient)
