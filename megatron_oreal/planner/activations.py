"""What a micro-batch leaves on a rank: bytes that layers keep, and that one needs while it runs.

Counted in elements a token; docs/planner.md derives them. h hidden, q and k rows of queries and of
keys, f feed-forward, d head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_oreal.planner.sizes import FP32, element_bytes

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config
    from megatron_oreal.planner.hardware import Modules
    from megatron_oreal.planner.sizes import Dims

ROTARY = 4  # cosines and sines, of queries and of keys
MLP = 5  # gate and up in one, silu(gate), a copy of up, and the product that the last matrix reads


class LayerActivations:
    """Bytes of one layer and one micro-batch on a rank of a layout."""

    def __init__(self, config: Config, dims: Dims, modules: Modules) -> None:
        layout, self._size = config.parallel, element_bytes(config)
        self._recompute = config.engine.recompute
        self._tokens = config.engine.tokens_per_micro_batch / layout.context
        shared = layout.tensor if layout.sequence_parallel else 1
        self._hidden = dims.hidden / shared
        # Tokens are gathered before a matrix that is cut by columns, and after one cut by rows.
        self._gathered = 2 * dims.hidden if shared > 1 else 0
        self._ffn = dims.ffn / layout.tensor
        self._norm = 2 if modules == "transformer_engine" else 3
        attention = _attention(config, dims, modules) / layout.tensor
        self._whole = 2 * self._norm * self._hidden + attention + ROTARY * dims.head_dim
        self._whole += MLP * self._ffn
        self._mask = _mask_bytes(config) if modules == "torch" else 0.0
        self._matrix = 2 * self._ffn * dims.hidden * self._size

    @property
    def whole(self) -> int:
        """What its backward pass reads, if nothing is recomputed."""
        return math.ceil(self._bytes(self._whole) + self._mask)

    @property
    def kept(self) -> int:
        """What it keeps from its forward pass until its backward pass."""
        if self._recompute == "selective":
            return self.whole - math.ceil(self._bytes(MLP * self._ffn))
        return math.ceil(self._bytes(self._hidden)) if self._recompute == "full" else self.whole

    @property
    def backward(self) -> int:
        """What its backward pass holds beyond that: gradients, and what is computed once more."""
        gradients = 2 * self._ffn + 2 * self._hidden + self._gathered
        return self.whole - self.kept + math.ceil(self._bytes(gradients) + self._matrix)

    @property
    def forward(self) -> int:
        """What it holds while it runs and nothing is kept."""
        return math.ceil(self._bytes(MLP * self._ffn + 4 * self._hidden + self._gathered))

    @property
    def last_norm(self) -> int:
        """What the norm behind the last layer keeps."""
        return math.ceil(self._bytes(self._norm * self._hidden))

    def _bytes(self, elements: float) -> float:
        return elements * self._tokens * self._size


def _attention(config: Config, dims: Dims, modules: Modules) -> float:
    """Elements a token, before they are cut by tensor parallelism."""
    queries, keys = dims.query_rows, dims.kv_rows
    if modules == "transformer_engine":
        # Queries, keys and values in one, of which values are a view; both turned; the output.
        return 3 * (queries + keys)
    if config.parallel.context == 1:  # the output in parts, one a sequence, and as a whole
        return 4 * queries + 3 * keys
    return 3 * queries + 2 * keys * config.parallel.context  # those of all ranks


def _mask_bytes(config: Config) -> float:
    """Masks in fp32 of torch's kernel, a rank's tokens by those before: context parallelism alone.

    A rank has two of the 2 CP chunks of each sequence, which see 2 CP + 1 chunks together.
    """
    ranks = config.parallel.context
    if ranks == 1:
        return 0.0
    longest = config.sampling.max_total_tokens
    pairs = (2 * ranks + 1) / (4 * ranks**2) * longest
    return FP32 * pairs * config.engine.tokens_per_micro_batch
