"""Causal attention over packed sequences through torch's own kernel, without Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_oreal.parallel.context import SequenceCut


class PackedCoreAttention(MegatronModule):
    """Megatron's core attention for `thd` batches: each sequence attends to itself, causally.

    Under context parallelism keys and values are gathered from all ranks of the group, and each
    rank attends for the tokens that it holds. Megatron builds it with more arguments than it needs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp
        self.cut = SequenceCut(cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank())

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
        """Attends within each sequence; collective over the context-parallel group.

        Args:
            query: `[t/cp, heads/tp, d]`.
            key: `[t/cp, kv_heads/tp, d]`.
            value: `[t/cp, kv_heads/tp, d]`.
            packed_seq_params: where each sequence starts and ends, counted over all ranks.

        Returns:
            `[t/cp, heads/tp * d]`.
        """
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        key, value = self._gathered(key, value, lengths)
        spans = [
            (start, low, high)
            for start, length in zip(bounds, lengths, strict=False)
            for low, high in self.cut.chunks(length)
        ]
        parts = query.split([high - low for _, low, high in spans])
        attended = [
            _attend(
                part, key[start : start + high], value[start : start + high], self.softmax_scale
            )
            for part, (start, _, high) in zip(parts, spans, strict=True)
        ]
        return torch.cat(attended).flatten(start_dim=1)

    def _gathered(
        self, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of the whole pack, `[t, kv_heads/tp, d]`, in its order.

        Backward, each rank gets the sum of the gradients that all ranks have for its tokens.
        """
        if self.cut.cp_size == 1:
            return key, value
        both = gather_from_sequence_parallel_region(
            torch.stack((key, value), 1), group=self.cp_group
        )
        return both[self.cut.sequence_order(lengths)].unbind(1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence to all of it: `[s, heads, d]` in and out.

    Key-value heads are shared; the last query stands at the last key.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    whole = len(query) == len(key)
    earlier = len(key) - len(query)
    mask = None if whole else query.new_ones(len(query), len(key), dtype=torch.bool).tril(earlier)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=grouped
    )
    return out.squeeze(0).transpose(0, 1)
