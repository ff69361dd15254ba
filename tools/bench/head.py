"""Times the language-model head, forward and backward, against the three matrix products in it.

All ways start from the same hidden states [T, H], output weight [V, H] and targets, and end with
the gradients of both by the mean cross-entropy:

- products: logits, and the two products of a gradient of theirs, at once; no softmax at all;
- ours: the chunked head, its logits in bf16 or fp32, the weight's gradient added up in the
  weight's precision or in fp32;
- recomputed: chunks in plain torch under autograd, computed again in the backward pass;
- liger: Liger's fused linear cross-entropy, where liger_kernel can be imported.

Times are medians over repeats, in turns. Extra memory is the peak beyond what lies there before and
both gradients in the inputs' precision. Errors are against float64 on the same inputs: of
log-probabilities and entropy in nats, of the gradients dh and dW their norm by that of the truth.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from megatron_oreal.config.head_chunks import LOGITS_BYTES
from megatron_oreal.models.heads import HeadSettings, vocab_logprobs, vocab_shard
from megatron_oreal.parallel.collectives import start_world, stop_world

EPILOG = """
examples:
  python tools/bench/head.py                                                        # a CPU, seconds
  python tools/bench/head.py --tokens 16384 --hidden 5120 --vocab 19008 152064      # an H100
"""
GIB = 1 << 30
RECOMPUTED_TOKENS = 512  # of a chunk, as such heads have by default
Result = dict[str, float | str | int]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations of a block made and is still alive; keeps their peak.

    What an operator takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operation and looks at what is alive after it."""
        del types
        out = func(*args, **(kwargs or {}))
        known = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, torch.Tensor)]
        old = {x.untyped_storage()._cdata for x in known}
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in old:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (storage._weak_ref(), storage.nbytes())
        self.live = {
            key: value
            for key, value in self.live.items()
            if not torch.UntypedStorage._expired(value[0])
        }
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@dataclass(frozen=True)
class Inputs:
    """Hidden states `[t, h]`, weight `[v, h]`, targets `[t]`, and an fp32 gradient of the weight.

    The last stands for Megatron's buffer, where the ways go that add up in fp32.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    main_grad: torch.Tensor

    @classmethod
    def draw(
        cls, tokens: int, hidden: int, vocab: int, place: torch.device, dtype: torch.dtype
    ) -> Inputs:
        """Random ones whose logits have a standard deviation of 3; few tokens are certain."""
        generator = torch.Generator(place).manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, device=place, dtype=dtype)
        targets = torch.randint(0, vocab, (tokens,), generator=generator, device=place)
        weight = draw(vocab, hidden).mul_(3 / math.sqrt(hidden))
        main_grad = torch.zeros_like(weight, dtype=torch.float32)
        states = draw(tokens, hidden).requires_grad_()
        return cls(states, weight.requires_grad_(), targets, main_grad)

    def forget(self) -> None:
        """Drops the gradients."""
        self.hidden.grad = self.weight.grad = None
        self.main_grad.zero_()
        self.weight.main_grad = None  # pyright: ignore[reportAttributeAccessIssue]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of hidden states and weight, wherever a way has left them."""
        main_grad = getattr(self.weight, "main_grad", None)
        found = {"dh": self.hidden.grad, "dw": self.weight.grad if main_grad is None else main_grad}
        return {name: grad for name, grad in found.items() if grad is not None}


Way = Callable[[Inputs], Mapping[str, torch.Tensor]]
"""Leaves gradients in the inputs; returns log-probabilities and entropy `[t]` if it has them."""


def products(inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """The three matrix products and nothing else."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.T
    inputs.hidden.grad = logits @ weight
    inputs.weight.grad = logits.T @ hidden
    return {}


def ours(
    inputs: Inputs, settings: HeadSettings, group: dist.ProcessGroup
) -> Mapping[str, torch.Tensor]:
    """The head of this project."""
    if settings.fp32_weight_grad:
        inputs.weight.main_grad = inputs.main_grad  # pyright: ignore[reportAttributeAccessIssue]
    vocab, tokens = len(inputs.weight), len(inputs.hidden)
    out = vocab_logprobs(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        vocab_shard(vocab, vocab, group),
        settings,
        objective=lambda logprobs, _: -logprobs / tokens,
    )
    out.loss.backward()
    return {"logprobs": out.logprobs, "entropy": out.entropy}


def recomputed(inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """Chunks that autograd differentiates, computed twice."""

    def score(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")

    parts = zip(
        inputs.hidden.split(RECOMPUTED_TOKENS),
        inputs.targets.split(RECOMPUTED_TOKENS),
        strict=True,
    )
    scores = [checkpoint(score, h, inputs.weight, t, use_reentrant=False) for h, t in parts]
    logprobs = torch.cat(scores)  # pyright: ignore[reportArgumentType]
    (-logprobs.sum() / len(logprobs)).backward()
    return {"logprobs": logprobs.detach()}


def liger(inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """Liger's head, which returns a scalar."""
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()(inputs.weight, inputs.hidden, inputs.targets)
    loss.backward()
    return {}


def make_ways(inputs: Inputs, chunk_tokens: int | None, group: dist.ProcessGroup) -> dict[str, Way]:
    """All ways that run with these inputs on their device."""
    low = inputs.weight.dtype == torch.bfloat16
    variants = [("bf16", False, False), ("bf16", False, True), ("fp32", True, False)]
    ways: dict[str, Way] = {"products": products}
    for logits, fp32_logits, fp32_grad in variants if low else [("fp32", False, True)]:
        item = (6 if fp32_logits else 2) if low else 4
        most = chunk_tokens or max(1, LOGITS_BYTES // (len(inputs.weight) * item))
        settings = HeadSettings(most, fp32_logits, fp32_grad)
        name = f"ours, {logits} logits, dW in {'fp32' if fp32_grad else 'bf16'}"
        ways[name] = functools.partial(ours, settings=settings, group=group)
    ways["recomputed"] = recomputed
    if inputs.weight.is_cuda and importlib.util.find_spec("liger_kernel"):
        ways["liger"] = liger
    return ways


def float64_truth(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Log-probabilities and both gradients on the same inputs, some tokens at a time."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().double()
    found = {
        "logprobs": torch.empty(len(hidden), dtype=torch.float64, device=hidden.device),
        "entropy": torch.empty(len(hidden), dtype=torch.float64, device=hidden.device),
        "dh": torch.empty_like(hidden, dtype=torch.float64),
        "dw": torch.zeros_like(weight),
    }
    for start in range(0, len(hidden), 256):
        part = slice(start, start + 256)
        states = hidden[part].double()
        log_softmax = (states @ weight.T).log_softmax(dim=1)
        places = inputs.targets[part, None]
        found["logprobs"][part] = log_softmax.gather(1, places).squeeze(1)
        found["entropy"][part] = -(log_softmax.exp() * log_softmax).sum(dim=1)
        grad = log_softmax.exp_().scatter_add_(
            1, places, -torch.ones_like(places, dtype=torch.float64)
        )
        grad /= len(hidden)
        found["dh"][part] = grad @ weight
        found["dw"].addmm_(grad.T, states)
    return found


def errors(way: Way, inputs: Inputs, truth: Mapping[str, torch.Tensor]) -> Result:
    """Largest and mean errors of what a token gets; of gradients the norm by their own."""
    inputs.forget()
    found: Result = {}
    for name, values in way(inputs).items():
        apart = (values.double() - truth[name]).abs()
        found |= {f"{name}_max": float(apart.max()), f"{name}_mean": float(apart.mean())}
    for name, grad in inputs.gradients().items():
        found[name] = float((grad.double() - truth[name]).norm() / truth[name].norm())
    return found


def extra_gib(way: Way, inputs: Inputs) -> float:
    """Peak memory beyond the inputs and both gradients."""
    inputs.forget()
    if inputs.weight.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way(inputs)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as count:
            way(inputs)
        peak = count.peak
    return (peak - inputs.hidden.nbytes - inputs.weight.nbytes) / GIB


def milliseconds(ways: Mapping[str, Way], inputs: Inputs, repeats: int) -> dict[str, float]:
    """Median times; ways take turns, so that what disturbs the machine disturbs all."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            inputs.forget()
            if inputs.weight.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            way(inputs)
            if inputs.weight.is_cuda:
                torch.cuda.synchronize()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def measure(
    inputs: Inputs, repeats: int, chunk_tokens: int | None, group: dist.ProcessGroup
) -> Iterator[Result]:
    """Yields one row for each way."""
    ways = make_ways(inputs, chunk_tokens, group)
    times = milliseconds(ways, inputs, repeats)
    truth = float64_truth(inputs)
    for name, way in ways.items():
        row: Result = {"way": name, "vocab": len(inputs.weight), "ms": times[name]}
        row["over_products"] = times[name] / times["products"]
        if way is not products:
            row["extra_gib"] = extra_gib(way, inputs)
            row |= errors(way, inputs, truth)
        yield row


def versions() -> Result:
    """What ran: device, torch, and triton and Liger where installed."""
    found: Result = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    for package in ("torch", "triton", "liger-kernel"):
        present = importlib.util.find_spec(package.replace("-", "_")) is not None
        found[package] = metadata.version(package) if present else "not there"
    return found


def table(rows: Sequence[Result]) -> str:
    """One line a way."""
    columns = {
        "over_products": "x products",
        "ms": "ms",
        "extra_gib": "extra GiB",
        "logprobs_max": "logp max",
        "logprobs_mean": "logp mean",
        "entropy_max": "entr max",
        "dh": "dh",
        "dw": "dW",
    }
    lines = [f"{'V':>8} {'way':42}" + "".join(f"{title:>11}" for title in columns.values())]
    for row in rows:
        cells = (f"{row[key]:>11.3g}" if key in row else f"{'':>11}" for key in columns)
        lines.append(f"{row['vocab']:>8} {row['way']:42}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512, help="T (512)")
    parser.add_argument("--hidden", type=int, default=256, help="H (256)")
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 8192], help="V, several")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    parser.add_argument("--chunk-tokens", type=int, help="of our head (what 448 MiB hold)")
    parser.add_argument("--repeats", type=int, default=5, help="after a first run (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start_world()
    group = dist.group.WORLD
    assert group is not None
    shape = {"tokens": options.tokens, "hidden": options.hidden, "dtype": options.dtype}
    rows: list[Result] = []
    for vocab in options.vocab:
        dtype = getattr(torch, options.dtype)
        inputs = Inputs.draw(options.tokens, options.hidden, vocab, device, dtype)
        rows += measure(inputs, options.repeats, options.chunk_tokens, group)
    stop_world()
    about = versions() | shape
    if options.json:
        print(json.dumps(about | {"rows": rows}))
    else:
        print(", ".join(f"{key} {value}" for key, value in about.items()), table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
