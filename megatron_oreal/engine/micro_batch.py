"""One micro-batch as the models read it: trajectories end to end, and where they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_oreal.parallel.context import SequenceCut, round_up
from megatron_oreal.parallel.cuda_on_cpu import compute_device
from megatron_oreal.types import PackedBatch, Trajectory

ScorePosition = Literal["before", "at"]


@dataclass(frozen=True)
class MicroBatch:
    """Packed tokens `[t/cp]`, those that this context-parallel rank holds.

    `[n]` runs over the response tokens that this rank scores, trajectory by trajectory.
    `positions[j]` is where in `tokens` the hidden state stands that scores response token
    `targets[j]`: the token before it, or, for token scores `at`, the token itself. `sequence[j]`
    counts the trajectories of this micro-batch; `slots[j]` counts the response tokens of the whole
    batch. `rewards` and `response_lengths` are `[trajectories]`; every field is `[n]`.

    `packed` describes the sequences as they are over all context-parallel ranks, padding included.
    """

    tokens: torch.Tensor
    packed: PackedSeqParams
    positions: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    slots: torch.Tensor
    rewards: torch.Tensor
    response_lengths: torch.Tensor
    fields: dict[str, torch.Tensor]


def lay_out(
    batch: PackedBatch,
    indices: Sequence[int],
    cut: SequenceCut,
    *,
    score_position: ScorePosition = "before",
    fill_to: int = 0,
) -> MicroBatch:
    """Lays the trajectories `indices` of the batch end to end and takes this rank's cut.

    Each is padded at its end as the cut asks; a last sequence of padding, attended to by nobody
    else, evens out the total and brings it to `fill_to` tokens or more. Padding is scored nowhere.
    Without trajectories the micro-batch is padding only.
    """
    device = compute_device()
    chosen = [batch.trajectories[i] for i in indices]
    lengths = [round_up(len(t.tokens), cut.sequence_multiple) for t in chosen]
    rest = round_up(max(sum(lengths), fill_to, 1), cut.total_multiple) - sum(lengths)
    lengths += [rest] if rest else []
    held = cut.positions(lengths)
    positions = _scored_positions(chosen, lengths, score_position)
    here = torch.full((sum(lengths),), -1)
    here[held] = torch.arange(len(held))
    mine = here[positions] >= 0

    def cut_out(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return _concatenate(parts, dtype)[mine].to(device)

    return MicroBatch(
        tokens=_padded_tokens(chosen, lengths)[held].to(device),
        packed=_packed_seq_params(lengths, cut, device),
        positions=here[positions][mine].to(device),
        targets=cut_out([torch.tensor(t.tokens[t.prompt_length :]) for t in chosen], torch.int64),
        sequence=cut_out(
            [torch.full((t.response_length,), i) for i, t in enumerate(chosen)], torch.int64
        ),
        slots=_slots(batch, indices)[mine],
        rewards=torch.tensor([t.reward for t in chosen], dtype=torch.float32, device=device),
        response_lengths=torch.tensor(
            [t.response_length for t in chosen], dtype=torch.int64, device=device
        ),
        fields={
            name: cut_out([values[i] for i in indices], torch.float32)
            for name, values in batch.fields.items()
        },
    )


def _padded_tokens(chosen: Sequence[Trajectory], lengths: Sequence[int]) -> torch.Tensor:
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    for start, trajectory in zip(accumulate(lengths, initial=0), chosen, strict=False):
        tokens[start : start + len(trajectory.tokens)] = torch.tensor(trajectory.tokens)
    return tokens


def _scored_positions(
    chosen: Sequence[Trajectory], lengths: Sequence[int], score_position: ScorePosition
) -> torch.Tensor:
    """Returns where in the whole pack each response token is scored."""
    shift = 1 if score_position == "before" else 0
    starts = accumulate(lengths, initial=0)
    return _concatenate(
        [
            torch.arange(start + t.prompt_length, start + len(t.tokens)) - shift
            for start, t in zip(starts, chosen, strict=False)
        ],
        torch.int64,
    )


def _slots(batch: PackedBatch, indices: Sequence[int]) -> torch.Tensor:
    """Returns where these trajectories' response tokens stand among those of the batch."""
    ends = list(accumulate((t.response_length for t in batch.trajectories), initial=0))
    return _concatenate([torch.arange(ends[i], ends[i + 1]) for i in indices], torch.int64)


def _packed_seq_params(
    lengths: Sequence[int], cut: SequenceCut, device: torch.device
) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    if cut.cp_size > 1:
        # Transformer Engine asks for these too. To it, padding is part of a sequence: causal
        # attention keeps it from the real tokens before it.
        packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = bounds
    return packed


def _concatenate(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Joins parts that may be none at all."""
    return torch.cat([torch.empty(0, dtype=dtype), *(part.to(dtype) for part in parts)])
