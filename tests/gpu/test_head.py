"""The head on the device: its kernels, its errors and its memory at the size of a 32B model."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_oreal.config.head_chunks import LOGITS_BYTES
from megatron_oreal.models import head_passes
from megatron_oreal.models.heads import HeadSettings
from megatron_oreal.parallel.collectives import start_world, stop_world
from tests.unit.models.test_head_passes import BF16, FP32, Shape, check, make_case
from tools.bench.head import Inputs, errors, extra_gib, float64_truth, ours

HIDDEN = 5120
VOCABS = (19_008, 152_064)  # of a rank at tensor parallelism 8 and 1


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process."""
    start_world()
    group = dist.group.WORLD
    assert group is not None
    yield group
    stop_world()


def draw(tokens: int, vocab: int) -> Inputs:
    return Inputs.draw(tokens, HIDDEN, vocab, torch.device("cuda"), BF16)


def settings(vocab: int, *, fp32_logits: bool) -> HeadSettings:
    """As a run has them, but for the sums of the weight's gradient: what a graph gets is bf16."""
    most = LOGITS_BYTES // (vocab * (6 if fp32_logits else 2))
    return HeadSettings(most, fp32_logits, fp32_weight_grad=False)


@pytest.mark.parametrize("logits", [BF16, FP32])
@pytest.mark.parametrize("words", [*VOCABS, 9001, 100, 0])
def test_kernels_agree_with_float64(words: int, logits: torch.dtype) -> None:
    case = make_case(Shape(77, words, logits, BF16))
    case = {name: tensor.cuda() for name, tensor in case.items()}
    passes = head_passes.passes_on(torch.device("cuda"))
    assert passes is not head_passes.PASSES
    found = {"statistics": passes.statistics(case["logits"], case["columns"])}
    source = case["logits"].clone()
    out = source if logits == BF16 else case["out"]
    passes.gradient(source, case["columns"], case["log_total"], case["slope"], out)
    on_cpu = {name: tensor.cpu() for name, tensor in (found | {"gradient": out}).items()}
    check(on_cpu, {name: tensor.cpu() for name, tensor in case.items()})


@pytest.mark.parametrize("fp32_grad", [False, True])
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_the_head_agrees_with_float64_whatever_the_last_chunk_is(
    alone: dist.ProcessGroup, fp32_logits: bool, fp32_grad: bool
) -> None:
    inputs = draw(1000, VOCABS[0])
    chunks = HeadSettings(384, fp32_logits, fp32_grad)

    way = functools.partial(ours, settings=chunks, group=alone)
    found = errors(way, inputs, float64_truth(inputs))
    assert float(found["dh"]) < 2**-7
    assert float(found["dw"]) < 2**-7
    assert float(found["logprobs_max"]) < (2e-3 if fp32_logits else 2**-4)


@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_of_fp32_logits_are_within_2e_3(alone: dist.ProcessGroup, vocab: int) -> None:
    inputs = draw(2048, vocab)
    chunks = settings(vocab, fp32_logits=True)
    logprobs = ours(inputs, chunks, alone)["logprobs"]
    inputs.forget()
    truth = float64_truth(inputs)["logprobs"]
    assert float((logprobs.double() - truth).abs().max()) < 2e-3


@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("vocab", VOCABS)
def test_half_a_gib_beyond_both_gradients_is_enough(
    alone: dist.ProcessGroup, vocab: int, fp32_logits: bool
) -> None:
    inputs = draw(16_384, vocab)
    chunks = settings(vocab, fp32_logits=fp32_logits)
    way = functools.partial(ours, settings=chunks, group=alone)
    way(inputs)  # workspaces of the products stay
    assert extra_gib(way, inputs) <= 0.5
