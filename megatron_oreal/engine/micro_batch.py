"""One micro-batch as the models read it: trajectories end to end, and where they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_oreal.parallel.cuda_on_cpu import compute_device
from megatron_oreal.types import PackedBatch

ScorePosition = Literal["before", "at"]


@dataclass(frozen=True)
class MicroBatch:
    """Packed `[t]` tokens; `[n]` runs over the response tokens of all trajectories in order.

    `positions[j]` is where in `[t]` the hidden state stands that scores response token
    `targets[j]`: the token before it, or, for token scores `at`, the token itself. `sequence[j]`
    counts the trajectories of this micro-batch. `rewards` is `[trajectories]`; every field is
    `[n]`.
    """

    tokens: torch.Tensor
    packed: PackedSeqParams
    positions: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    rewards: torch.Tensor
    fields: dict[str, torch.Tensor]


def lay_out(
    batch: PackedBatch,
    indices: Sequence[int],
    *,
    multiple: int,
    score_position: ScorePosition = "before",
) -> MicroBatch:
    """Lays the trajectories `indices` of the batch end to end.

    Padding makes the length a multiple of `multiple`: a last sequence of its own, attended to by
    nobody and scored nowhere. Without trajectories the micro-batch is padding only.
    """
    device = compute_device()
    chosen = [batch.trajectories[i] for i in indices]
    lengths = [len(trajectory.tokens) for trajectory in chosen]
    padding = -sum(lengths) % multiple or (0 if lengths else multiple)
    sequences = lengths + [padding] * (padding > 0)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    flat = [token for trajectory in chosen for token in trajectory.tokens]
    pairs = list(zip(starts, chosen, strict=True))
    shift = 1 if score_position == "before" else 0
    return MicroBatch(
        tokens=torch.tensor(flat + [0] * padding, device=device),
        packed=_packed_seq_params(sequences, device),
        positions=_concatenate(
            [torch.arange(s + t.prompt_length, s + len(t.tokens)) - shift for s, t in pairs],
            torch.int64,
        ).to(device),
        targets=_concatenate(
            [torch.tensor(t.tokens[t.prompt_length :]) for t in chosen], torch.int64
        ).to(device),
        sequence=_concatenate(
            [torch.full((t.response_length,), i) for i, t in enumerate(chosen)], torch.int64
        ).to(device),
        rewards=torch.tensor([t.reward for t in chosen], dtype=torch.float32, device=device),
        fields={
            name: _concatenate([values[i] for i in indices], torch.float32).to(device)
            for name, values in batch.fields.items()
        },
    )


def _packed_seq_params(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _concatenate(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Joins parts that may be none at all."""
    return torch.cat([torch.empty(0, dtype=dtype), *(part.to(dtype) for part in parts)])
