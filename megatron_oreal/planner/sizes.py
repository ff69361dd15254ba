"""How many parameters a model has, whole and on one rank of a layout; plain arithmetic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_oreal.config.stages import layers_of_stages
from megatron_oreal.config.validate import ModelSizes

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config, ParallelConfig

Head = Literal["vocab", "scalar"]

FP32 = 4


class Dims(ModelSizes, Protocol):
    """The dimensions of a dense decoder, as `models.family.ModelDims` has them."""

    @property
    def hidden(self) -> int: ...  # noqa: D102
    @property
    def tied_embeddings(self) -> bool: ...  # noqa: D102
    @property
    def qkv_bias(self) -> bool: ...  # noqa: D102
    @property
    def qk_norm(self) -> bool: ...  # noqa: D102
    @property
    def query_rows(self) -> int: ...  # noqa: D102
    @property
    def kv_rows(self) -> int: ...  # noqa: D102


def element_bytes(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.model.precision == "bf16" else FP32


def layer_parameters(dims: Dims, tensor: int = 1, kv_copies: int = 1) -> int:
    """Parameters of a layer on one of `tensor` ranks, key-value heads held so many times over."""
    rows = dims.query_rows + 2 * dims.kv_rows * kv_copies
    bias = math.ceil(rows / tensor) if dims.qkv_bias else 0
    norms = 2 * dims.hidden + (2 * dims.head_dim if dims.qk_norm else 0)
    return layer_matrices(dims, tensor, kv_copies) + bias + norms


def layer_matrices(dims: Dims, tensor: int = 1, kv_copies: int = 1) -> int:
    """The same without biases and norms."""
    rows = 2 * dims.query_rows + 2 * dims.kv_rows * kv_copies + 3 * dims.ffn
    return math.ceil(rows * dims.hidden / tensor)


def engine_copies(dims: Dims, tensor: int) -> int:
    """How often an engine of so many ranks holds each key-value head."""
    return max(1, tensor // dims.kv_heads)


def vocabulary_parameters(dims: Dims, tensor: int = 1) -> int:
    """Parameters of the embedding, or of the output, on one of `tensor` ranks, padding included."""
    return math.ceil(dims.vocab / tensor) * dims.hidden


def parameters(dims: Dims) -> int:
    """Parameters of the whole model, tied embeddings counted once."""
    ends = 1 if dims.tied_embeddings else 2
    body = dims.layers * layer_parameters(dims) + dims.hidden
    return body + ends * vocabulary_parameters(dims)


def stage_parameters(dims: Dims, layout: ParallelConfig, stage: int, head: Head) -> int:
    """Parameters on one rank of a pipeline stage of a model with this head."""
    tensor = layout.tensor
    count = layers_of_stages(layout, dims.layers)[stage] * layer_parameters(dims, tensor)
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        count += vocabulary_parameters(dims, tensor)
    if last:
        count += dims.hidden
        if head == "scalar":
            count += dims.hidden
        elif not (first and dims.tied_embeddings):
            count += vocabulary_parameters(dims, tensor)
    return count


def engine_parameters(dims: Dims, tensor: int) -> int:
    """Parameters on one rank of a vLLM engine, which copies key-value heads it has too few of."""
    copies = engine_copies(dims, tensor)
    ends = 1 if dims.tied_embeddings else 2
    body = dims.layers * layer_parameters(dims, tensor, copies) + dims.hidden
    return body + ends * vocabulary_parameters(dims, tensor)
