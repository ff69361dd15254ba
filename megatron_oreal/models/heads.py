"""What stands on the last hidden states: chunked vocabulary log-probabilities, or a score a token.

The language-model head never holds the logits of a micro-batch. It walks over the response tokens
in chunks; while a chunk's logits exist it takes the log-probability and entropy of each token and,
when it trains, the gradient of an elementwise objective of those log-probabilities, which is
written over the logits: three matrix products a chunk, nothing kept, nothing computed again;
docs/head.md says more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_oreal.config.head_chunks import chunk_tokens
from megatron_oreal.models.head_passes import Passes, passes_on

Fields = Mapping[str, torch.Tensor]
Objective = Callable[[torch.Tensor, Fields], torch.Tensor]
"""Elementwise `(logprobs [n], fields: dict of [n]) -> loss [n]`, over the global denominators."""


class HeadOutput(NamedTuple):
    """`loss` is the local sum, a scalar; `logprobs` and `entropy` are `[n]`, fp32 and detached."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor


class VocabShard(NamedTuple):
    """This rank's rows of the output weight: from `start` on, within the true vocabulary."""

    start: int
    rows: int
    group: dist.ProcessGroup


class HeadSettings(NamedTuple):
    """How the head computes; the result is the same but for rounding.

    `most_tokens` of a chunk; whether logits of a bf16 model are fp32; whether the chunks' parts of
    the weight's gradient are added up in fp32, else in the weight's own precision.
    """

    most_tokens: int
    fp32_logits: bool = False
    fp32_weight_grad: bool = True


def vocab_shard(padded_rows: int, vocab: int, group: dist.ProcessGroup) -> VocabShard:
    """Returns the rows of this rank that are words; padding rows at the end are left out."""
    start = group.rank() * padded_rows
    return VocabShard(start, max(0, min(padded_rows, vocab - start)), group)


def vocab_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabShard,
    settings: HeadSettings,
    *,
    objective: Objective | None = None,
    fields: Fields | None = None,
) -> HeadOutput:
    """Scores `targets` under softmax(hidden @ weight.T), a chunk of tokens at a time.

    Collective over `shard.group` (tensor parallel). `logprobs[i]` scores `targets[i]` given
    `hidden[i]`. Where Megatron gave the weight a `main_grad` of the precision that its gradient is
    added up in, the backward pass adds the gradient there; else autograd gets it.

    Args:
        hidden: `[n, h]`, the same on every rank of the group; its gradient is this rank's part.
        weight: `[v/tp, h]`, this rank's rows, padding rows included.
        targets: `[n]` global token ids.
        shard: which of the rows are words, and the group they are spread over.
        settings: how large chunks are, and the precisions.
        objective: what is differentiated; without one the loss is zero and nothing is.
        fields: `[n]` each, handed to the objective chunk by chunk.
    """
    walk = _Walk(
        hidden.detach(),
        targets,
        weight.detach()[: shard.rows],
        shard,
        settings,
        passes_on(weight.device),
        objective,
        fields or {},
    )
    if objective is None:
        with torch.no_grad():
            return walk()
    return HeadOutput(*_ObjectiveHead.apply(hidden, weight, walk))


class _Gradients(NamedTuple):
    """Of the hidden states, `[n, h]`, and of the whole weight, `[v/tp, h]`."""

    hidden: torch.Tensor
    weight: torch.Tensor


class _ObjectiveHead(torch.autograd.Function):
    """Takes the objective's gradient in the forward pass; the backward pass scales it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        hidden, weight, walk = args
        dtype = torch.float32 if walk.settings.fp32_weight_grad else weight.dtype
        grads = _Gradients(torch.empty_like(hidden), torch.empty_like(weight, dtype=dtype))
        # The first chunk writes the gradient of the words, if there is a chunk.
        grads.weight[walk.shard.rows if len(hidden) else 0 :].zero_()
        out = walk(grads)
        ctx.grads, ctx.weight = grads, weight
        ctx.mark_non_differentiable(out.logprobs, out.entropy)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, so that no second copy exists: a graph has one backward pass.
        scale = grad_outputs[0]
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        if _add_to_main_grad(ctx.weight, weight_grad, scale):
            del weight_grad  # the stand-in may have its memory
            weight_grad = _stand_in(ctx.weight)
        else:
            weight_grad = weight_grad.mul_(scale).to(ctx.weight.dtype)
        return hidden_grad.mul_(scale), weight_grad, None


def _add_to_main_grad(weight: Any, grad: torch.Tensor, scale: torch.Tensor) -> bool:
    """Adds `scale * grad` where Megatron adds up gradients, if in this precision."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or main_grad.dtype != grad.dtype:
        return False
    main_grad.addcmul_(grad, scale)
    weight.grad_added_to_main_grad = True
    return True


def _stand_in(weight: Any) -> torch.Tensor:
    """What autograd gets for a gradient that is delivered: Megatron's hook must find one.

    The hook drops it; of a weight that embeds as well it adds what autograd has summed up.
    """
    tied = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if tied else torch.empty_like(weight)


class _Walk(NamedTuple):
    """One pass over the chunks; with `grads` it fills these as well."""

    hidden: torch.Tensor
    targets: torch.Tensor
    words: torch.Tensor
    shard: VocabShard
    settings: HeadSettings
    passes: Passes
    objective: Objective | None
    fields: Fields

    def __call__(self, grads: _Gradients | None = None) -> HeadOutput:
        """Collective over the shard's group; one buffer of logits serves all chunks."""
        hidden = self.hidden
        out = HeadOutput(
            hidden.new_zeros((), dtype=torch.float32),
            hidden.new_empty(len(hidden), dtype=torch.float32),
            hidden.new_empty(len(hidden), dtype=torch.float32),
        )
        tokens = chunk_tokens(self.settings.most_tokens, len(hidden))
        dtype = torch.float32 if self.settings.fp32_logits else hidden.dtype
        buffer = hidden.new_empty(min(tokens, len(hidden)), len(self.words), dtype=dtype)
        for start in range(0, len(hidden), tokens):
            part = slice(start, min(start + tokens, len(hidden)))
            self._chunk(part, buffer[: part.stop - start], out, grads)
        return out

    def _chunk(
        self, part: slice, logits: torch.Tensor, out: HeadOutput, grads: _Gradients | None
    ) -> None:
        hidden = self.hidden[part]
        columns = _local_columns(self.targets[part], self.shard)
        _multiply(hidden, self.words, logits)
        found = self.passes.statistics(logits, columns)
        out.logprobs[part], out.entropy[part], log_total = _join(found, self.shard.group)
        if grads is None or self.objective is None:
            return
        fields = {name: values[part] for name, values in self.fields.items()}
        loss, slope = _differentiate(self.objective, out.logprobs[part], fields)
        out.loss.add_(loss)
        grad = (
            logits if logits.dtype == hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
        )
        self.passes.gradient(logits, columns, log_total, slope, grad)
        torch.mm(grad, self.words, out=grads.hidden[part])
        _add_product(grads.weight[: self.shard.rows], grad, hidden, first=part.start == 0)


def _local_columns(targets: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Returns each target's column in this shard, `[c]`, -1 where another shard has it."""
    columns = targets - shard.start
    return columns.masked_fill((columns < 0) | (columns >= shard.rows), -1)


def _multiply(hidden: torch.Tensor, words: torch.Tensor, logits: torch.Tensor) -> None:
    """Fills `logits` `[c, v]` with hidden @ words.T, rounded to their precision alone."""
    if logits.dtype == hidden.dtype:
        torch.mm(hidden, words.t(), out=logits)
    elif logits.is_cuda:
        torch.mm(hidden, words.t(), out_dtype=logits.dtype, out=logits)
    else:  # a CPU has no product of mixed precision
        torch.mm(hidden.float(), words.t().float(), out=logits)


def _add_product(
    total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, *, first: bool
) -> None:
    """Adds grad.T @ hidden to `total` `[v, h]`; `first` overwrites it."""
    beta = 0 if first else 1
    if total.dtype == grad.dtype:
        torch.addmm(total, grad.t(), hidden, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, grad.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, grad.t().float(), hidden.float(), beta=beta, out=total)


def _join(
    found: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Joins the statistics of all shards; collective over `group`.

    Gathered, not reduced: one exchange, and every rank adds up in the same order.

    Returns:
        log-probability of the target, entropy, and the logarithm of the sum of exp, `[c]` each.
    """
    shards = found.unsqueeze(0)
    if group.size() > 1:
        shards = found.new_empty(group.size(), *found.shape)
        dist.all_gather(list(shards.unbind()), found, group=group)
    highest, total, weighted, target = shards.unbind(dim=1)  # [tp, c] each
    top = highest.amax(dim=0)
    below = highest - top
    share = below.exp()
    weighted = ((weighted + total * below) * share).sum(dim=0)
    total = (total * share).sum(dim=0)
    log_total = total.log()
    return target.sum(dim=0) - top - log_total, log_total - weighted / total, top + log_total


def _differentiate(
    objective: Objective, logprobs: torch.Tensor, fields: Fields
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the chunk's summed loss and its slope at each log-probability, `[c]`."""
    with torch.enable_grad():
        point = logprobs.detach().clone().requires_grad_()
        loss = objective(point, fields).sum()
        (slope,) = torch.autograd.grad(loss, point)
    return loss.detach(), slope


class OutputRows(torch.nn.Module):
    """The output layer's weight `[v/tp, h]`, returned by a call; None where the embedding's serves.

    Called rather than read, so that hooks run: Megatron's wait there for the all-gather of weights
    that the last update changed on other ranks.
    """

    weight: torch.nn.Parameter | None

    def __init__(self, weight: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("weight", weight)

    def forward(self) -> torch.nn.Parameter | None:
        """Returns the weight."""
        return self.weight


class ScalarHead(torch.nn.Module):
    """The token reward model's head: linear, no bias, fp32 scores.

    It is drawn from U(-1/sqrt(h), 1/sqrt(h)) and stands where `GPTModel` keeps its output layer.
    Under sequence parallelism each rank scores its own tokens and the weight is marked so that
    Megatron sums its gradient over TP.
    """

    def __init__(self, config: TransformerConfig, seed: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(config.hidden_size)
        generator = torch.Generator().manual_seed(seed)  # alike on every rank
        drawn = torch.rand(1, config.hidden_size, generator=generator) * 2 * bound - bound
        self.weight = torch.nn.Parameter(drawn.to(config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores every token: `[t/tp or t, 1, h]` to `[t]`, fp32.

        Collective over the tensor-parallel group under sequence parallelism.
        """
        scores = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False)
        return scores.flatten()
