"""What stands on the last hidden states: chunked vocabulary log-probabilities, or a score a token.

The language-model head never holds the logits of a micro-batch. It walks over the response tokens
in chunks; while a chunk's logits exist it takes the log-probability and entropy of each token and,
when it trains, the gradient of an elementwise objective of those log-probabilities, so that nothing
is recomputed in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

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


def vocab_shard(padded_rows: int, vocab: int, group: dist.ProcessGroup) -> VocabShard:
    """Returns the rows of this rank that are words; padding rows at the end are left out."""
    start = group.rank() * padded_rows
    return VocabShard(start, max(0, min(padded_rows, vocab - start)), group)


def vocab_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabShard,
    *,
    chunk_tokens: int,
    objective: Objective | None = None,
    fields: Fields | None = None,
) -> HeadOutput:
    """Scores `targets` under softmax(hidden @ weight.T), a chunk of tokens at a time.

    Collective over `shard.group` (tensor parallel). `logprobs[i]` scores `targets[i]` given
    `hidden[i]`.

    Args:
        hidden: `[n, h]`, the same on every rank of the group; its gradient is this rank's part.
        weight: `[v/tp, h]`, this rank's rows, padding rows included.
        targets: `[n]` global token ids.
        shard: which of the rows are words, and the group they are spread over.
        chunk_tokens: how many tokens' logits exist at once.
        objective: what is differentiated; without one the loss is zero and nothing is.
        fields: `[n]` each, handed to the objective chunk by chunk.
    """
    if objective is None:
        with torch.no_grad():
            walk = _Walk(weight[: shard.rows], shard, chunk_tokens, None, {}, None)
            return walk(hidden, targets)
    loss, logprobs, entropy = _ObjectiveHead.apply(
        hidden, weight, targets, shard, chunk_tokens, objective, fields or {}
    )
    return HeadOutput(loss, logprobs, entropy)


class _ObjectiveHead(torch.autograd.Function):
    """Takes the objective's gradient in the forward pass; the backward pass scales it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        hidden, weight, targets, shard, chunk_tokens, objective, fields = args
        # Chunks add up in fp32, whatever the weight's precision.
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grads = (torch.empty_like(hidden), weight_grad[: shard.rows])
        walk = _Walk(weight[: shard.rows], shard, chunk_tokens, objective, fields, grads)
        out = walk(hidden, targets)
        ctx.grads = (grads[0], weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(out.logprobs, out.entropy)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Scaled in place, so that no second copy of the weight's gradient exists: a graph has one
        # backward pass.
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        scale = grad_outputs[0]
        return hidden_grad.mul_(scale), weight_grad.mul_(scale), None, None, None, None, None


class _Walk(NamedTuple):
    """One pass over the chunks; with `grads` it also fills `(hidden [n, h], words [v, h])`."""

    words: torch.Tensor
    shard: VocabShard
    chunk_tokens: int
    objective: Objective | None
    fields: Fields
    grads: tuple[torch.Tensor, torch.Tensor] | None

    def __call__(self, hidden: torch.Tensor, targets: torch.Tensor) -> HeadOutput:
        loss = hidden.new_zeros((), dtype=torch.float32)
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(hidden), self.chunk_tokens):
            part = slice(start, start + self.chunk_tokens)
            loss += self._chunk(hidden, targets, part, logprobs, entropy)
        return HeadOutput(loss, logprobs, entropy)

    def _chunk(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        part: slice,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
    ) -> torch.Tensor | float:
        logits = torch.mm(hidden[part], self.words.t()).float()  # [c, v]
        columns, mine = _local_columns(targets[part], self.shard)
        logprobs[part], entropy[part], probabilities = _log_softmax_at(
            logits, columns, mine, self.shard.group
        )
        if self.objective is None or self.grads is None:
            return 0.0
        fields = {name: values[part] for name, values in self.fields.items()}
        loss, slope = _differentiate(self.objective, logprobs[part], fields)
        # d logprob / d logits = onehot(target) - softmax
        grad = probabilities.mul_(-slope.unsqueeze(1))
        grad[mine, columns[mine]] += slope[mine]
        grad = grad.to(hidden.dtype)
        torch.mm(grad, self.words, out=self.grads[0][part])
        self.grads[1].addmm_(grad.t().float(), hidden[part].float())
        return loss


def _local_columns(targets: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each target's column in this shard, `[c]`, and whether it lies here, `[c]` bool."""
    columns = targets - shard.start
    mine = (columns >= 0) & (columns < shard.rows)
    return columns.masked_fill(~mine, 0), mine


def _log_softmax_at(
    logits: torch.Tensor, columns: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns log-probability of the target `[c]`, entropy `[c]` and softmax `[c, v/tp]`.

    `logits` are overwritten: at most two buffers of a chunk's size exist. Collective over `group`.
    """
    highest = (
        logits.max(dim=1).values if logits.shape[1] else logits.new_full((len(logits),), -math.inf)
    )
    _all_reduce(highest, dist.ReduceOp.MAX, group)
    logits -= highest.unsqueeze(1)
    target = logits.new_zeros(len(logits))
    target[mine] = logits[mine, columns[mine]]
    weights = logits.exp()
    sums = torch.stack((weights.sum(dim=1), logits.mul_(weights).sum(dim=1), target))
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    total, weighted, target = sums
    log_total = total.log()
    return target - log_total, log_total - weighted / total, weights.div_(total.unsqueeze(1))


def _all_reduce(
    tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup
) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)


def _differentiate(
    objective: Objective, logprobs: torch.Tensor, fields: Fields
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the chunk's summed loss and its slope at each log-probability, `[c]`."""
    with torch.enable_grad():
        point = logprobs.detach().clone().requires_grad_()
        loss = objective(point, fields).sum()
        (slope,) = torch.autograd.grad(loss, point)
    return loss.detach(), slope


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
