"""The head's benchmark runs on a CPU, and its numbers bound the head's errors against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankPools
from tools.bench.head import Inputs, measure, table

pytestmark = pytest.mark.parallel

TOKENS, HIDDEN, VOCAB, CHUNK = 512, 256, 2000, 64
HALF_ULP = 2**-5  # of bf16 from 8 to 16, where the largest logits of a token lie


def rows(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    group = dist.group.WORLD
    assert group is not None
    inputs = Inputs.draw(TOKENS, HIDDEN, VOCAB, torch.device("cpu"), dtype)
    found = list(measure(inputs, 1, CHUNK, group))
    assert len(table(found).splitlines()) == len(found) + 1
    return {str(row["way"]): row for row in found}


def test_errors_of_a_bf16_head(ranks: RankPools) -> None:
    [found] = ranks(1).run(rows, torch.bfloat16)
    low, summed, high, other = (
        found[name]
        for name in (
            "ours, bf16 logits, dW in bf16",
            "ours, bf16 logits, dW in fp32",
            "ours, fp32 logits, dW in bf16",
            "recomputed",
        )
    )
    # A logit is rounded, as is the sum that it is compared with: plain torch has the same error.
    assert low["logprobs_max"] < 2 * HALF_ULP
    assert low["logprobs_mean"] == pytest.approx(other["logprobs_mean"], rel=0.01)
    assert low["entropy_max"] < 2 * HALF_ULP
    assert max(high["logprobs_max"], high["entropy_max"]) < 1e-5  # in fp32 only sums are rounded
    assert max(row["dh"] for row in (low, summed, other)) < 2**-7
    # Eight chunks: added up in fp32 the weight's gradient has the rounding of its parts alone.
    assert summed["dw"] < 0.8 * low["dw"] < 2**-7
    assert max(high["dh"], high["dw"]) < max(low["dh"], low["dw"])


def test_errors_of_an_fp32_head(ranks: RankPools) -> None:
    [found] = ranks(1).run(rows, torch.float32)
    ours = found["ours, fp32 logits, dW in fp32"]
    assert max(ours[key] for key in ("logprobs_max", "entropy_max")) < 1e-5
    assert max(ours["dh"], ours["dw"]) < 1e-6
    chunk = CHUNK * VOCAB * 4 / 2**30
    assert chunk < ours["extra_gib"] < 1.25 * chunk + 2 * TOKENS * HIDDEN * 4 / 2**30
