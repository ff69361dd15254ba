"""The head's two passes over logits, plain torch and Triton, against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.models import head_passes

ROOT = Path(__file__).parents[3]
OVERLAYS = [path.parent for path in (ROOT / ".overlay").glob("*/triton")]
Case = dict[str, torch.Tensor]


class Shape(NamedTuple):
    """Tokens and words of a shard; the precisions of logits and of their gradient."""

    tokens: int
    words: int
    logits: torch.dtype
    out: torch.dtype


FP32, BF16 = torch.float32, torch.bfloat16
PLAIN_SUM = 4
SHAPES = [
    Shape(5, 300, FP32, FP32),
    Shape(3, 9001, BF16, BF16),  # more than two blocks of a kernel
    Shape(7, 4096, BF16, BF16),
    Shape(PLAIN_SUM, 131, FP32, BF16),
    Shape(2, 0, FP32, FP32),  # all of the shard is padding
    Shape(0, 64, FP32, FP32),
]


def make_case(shape: Shape) -> Case:
    """Random logits, one token's almost certain, another's target in a different shard."""
    generator = torch.Generator().manual_seed(shape.words)
    logits = 5 * torch.randn(shape.tokens, shape.words, generator=generator)
    columns = torch.randint(0, shape.words or 1, (shape.tokens,), generator=generator)
    if logits.numel():
        logits[0, columns[0]] = 60
    columns[1:2] = -1
    if not shape.words:
        columns.fill_(-1)
    logits = logits.to(shape.logits)
    slope = torch.randn(shape.tokens, generator=generator)
    return {
        "logits": logits,
        "columns": columns,
        "log_total": logits.double().logsumexp(dim=1).float(),
        # Of a plain sum autograd gives one number, spread by its strides.
        "slope": slope[:1].expand(shape.tokens) if shape.tokens == PLAIN_SUM else slope,
        "out": torch.empty_like(logits, dtype=shape.out),
    }


def in_torch(case: Case) -> Case:
    """Both passes, the gradient in place where the precisions are alike."""
    logits = case["logits"].clone()
    out = logits if case["out"].dtype == logits.dtype else case["out"].clone()
    found = head_passes.statistics(logits, case["columns"])
    head_passes.gradient(logits, case["columns"], case["log_total"], case["slope"], out)
    return {"statistics": found, "gradient": out}


def check(found: Case, case: Case) -> None:
    """Against float64; in bf16, whose neighbours are 2^-7 apart, rounded to either of two."""
    logits, columns = case["logits"].double(), case["columns"]
    tokens = torch.arange(len(logits))
    here = columns >= 0
    if logits.shape[1]:
        highest = logits.amax(dim=1)
        shifted = logits - highest[:, None]
        total, weighted = shifted.exp().sum(dim=1), (shifted.exp() * shifted).sum(dim=1)
        target = logits[tokens, columns.clamp(min=0)].where(here, 0.0)
    else:
        total = weighted = target = torch.zeros(len(logits))
        highest = torch.full_like(target, head_passes.FLOOR)
    expected = torch.stack((highest, total, weighted, target)).float()
    torch.testing.assert_close(found["statistics"], expected, rtol=2e-6, atol=2e-6)
    gradient = -(logits - case["log_total"].double()[:, None]).exp()
    gradient[tokens[here], columns[here]] += 1
    gradient = (gradient * case["slope"].double()[:, None]).to(case["out"].dtype)
    ulp = 2**-7 if case["out"].dtype == BF16 else 2e-6
    torch.testing.assert_close(found["gradient"], gradient, rtol=ulp, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_torch_agrees_with_float64(shape: Shape) -> None:
    case = make_case(shape)
    check(in_torch(case), case)


def test_a_gradient_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/4; the first is the target, the loss -2 log p."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log()
    columns = torch.tensor([0])
    highest, total, weighted, target = head_passes.statistics(logits, columns).flatten().tolist()
    assert (highest, total, target) == pytest.approx((0.693147, 2.0, 0.693147))
    assert weighted == pytest.approx(-0.693147)  # twice half of log(1/2)
    log_total = torch.tensor([highest]) + torch.tensor([total]).log()
    head_passes.gradient(logits, columns, log_total, torch.tensor([-2.0]), logits)
    assert logits.flatten().tolist() == pytest.approx([-1.0, 0.5, 0.5])


def run_program(*arguments: str, **variables: str) -> str:
    """Output of the program beside this file, with the overlay's triton on its path."""
    if not OVERLAYS:
        pytest.skip("triton lies in the overlay of the newer Megatron: make overlay")
    paths = os.pathsep.join((str(ROOT), str(OVERLAYS[0])))
    command = [sys.executable, str(Path(__file__).with_name("triton_program.py")), *arguments]
    environment = os.environ | {"PYTHONPATH": paths} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_agrees_with_float64_and_with_plain_torch(tmp_path: Path) -> None:
    cases = [make_case(shape) for shape in SHAPES]
    torch.save(cases, tmp_path / "in.pt")
    run_program("run", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), TRITON_INTERPRET="1")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for case, passes in zip(cases, found, strict=True):
        check(passes, case)
        plain = in_torch(case)
        torch.testing.assert_close(passes["statistics"], plain["statistics"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(passes["gradient"], plain["gradient"], rtol=2**-7, atol=2e-6)


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """Without one: down to machine code, which nothing here runs."""
    sizes = json.loads(run_program("compile", TRITON_CACHE_DIR=str(tmp_path)))
    assert len(sizes) == 4
    assert all(size > 1000 for size in sizes.values())
