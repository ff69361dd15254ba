"""Causal attention over packed sequences through torch's own kernel, without Transformer Engine."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig


class PackedCoreAttention(MegatronModule):
    """Megatron's core attention for `thd` batches: each sequence attends to itself, causally.

    Megatron builds it with more arguments than it needs; those it needs are `config` and
    `softmax_scale`.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> torch.Tensor:
        """Attends within each sequence.

        Args:
            query: `[t, heads/tp, d]`.
            key: `[t, kv_heads/tp, d]`.
            value: `[t, kv_heads/tp, d]`.
            packed_seq_params: where each sequence starts and ends.

        Returns:
            `[t, heads/tp * d]`.
        """
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        attended = [
            _attend(q, k, v, self.softmax_scale)
            for q, k, v in zip(
                query.split(lengths), key.split(lengths), value.split(lengths), strict=True
            )
        ]
        return torch.cat(attended).flatten(start_dim=1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention of one sequence: `[s, heads, d]` in and out, key-value heads shared."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)
