"""What a model family is: its dimensions, and where each Hugging Face tensor lies in Megatron."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

Kind = Literal["replicated", "column", "row", "qkv", "gate_up", "vocab"]
Size = Literal["hidden", "ffn", "vocab", "head_dim", "query_rows", "kv_rows", "scores"]

SCORE = "score.weight"  # of a token classifier

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class ModelDims:
    """The dimensions of a dense decoder, read from `config.json`; global, not per rank."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_factor: float | None = None  # of Llama 3's scaling of long wavelengths; None: unscaled

    @property
    def query_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    @property
    def scores(self) -> int:
        """Rows of a token reward model's head."""
        return 1

    def shape(self, sizes: tuple[Size, ...]) -> tuple[int, ...]:
        """Returns the numbers that these sizes stand for."""
        return tuple(getattr(self, size) for size in sizes)


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a checkpoint; `{i}` in its name is the layer, counted over the model."""

    name: str
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Row:
    """One line of a table: which Megatron parameter holds which Hugging Face tensors, and how.

    `megatron` lists the names the parameter may have (`{i}` is the layer, counted within the
    pipeline stage); the live model decides which it is. The kinds, for a tensor-parallel size `tp`:

    - `replicated`: whole on every rank;
    - `column`, `row`: dimension 0, or 1, is cut into `tp` equal ranges;
    - `vocab`: a column whose last ranges may hold padding rows;
    - `qkv`: q, k and v rows in the order [KV group: q.., k, v], cut into `tp` equal ranges;
    - `gate_up`: each rank has [its range of gate | its range of up].
    """

    kind: Kind
    megatron: tuple[str, ...]
    hf: tuple[HfTensor, ...]


@dataclass(frozen=True)
class Family:
    """A model family: its `model_type`, how dimensions are read from `config.json`, its table.

    `read_dims` raises `UserError` on keys that are missing, malformed or ask for what is not
    supported. With tied embeddings the checkpoint has no `output` tensor: `embedding` serves both.
    """

    name: str
    read_dims: Callable[[Mapping[str, Any]], ModelDims]
    rows: tuple[Row, ...]
    embedding: str = "model.embed_tokens.weight"
    output: str = "lm_head.weight"

    def tensors(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of a checkpoint of these dimensions, layer by layer."""
        once = [row for row in self.rows if "{i}" not in row.megatron[0]]
        layered = [row for row in self.rows if "{i}" in row.megatron[0]]
        lines = [(row, layer) for layer in range(dims.layers) for row in layered]
        return {
            name: dims.shape(tensor.sizes)
            for row, layer in [*((row, 0) for row in once), *lines]
            for name, tensor in zip(self.hf_names(row, layer, dims), row.hf, strict=True)
        }

    def hf_names(self, row: Row, layer: int, dims: ModelDims) -> tuple[str, ...]:
        """Returns the names of a row's tensors in this layer, tied embeddings resolved."""
        names = (tensor.name.replace("{i}", str(layer)) for tensor in row.hf)
        tied = dims.tied_embeddings
        return tuple(self.embedding if tied and name == self.output else name for name in names)

    def find(self, parameter: str) -> tuple[Row, int]:
        """Returns the row of a Megatron parameter and its layer in the stage (0 outside layers).

        Raises:
            KeyError: The table has no such parameter.
        """
        match = _LAYER.search(parameter)
        row = self._by_megatron_name[_LAYER.sub("{i}", parameter)]
        return row, int(match.group()) if match else 0

    @staticmethod
    def shift_layer(parameter: str, by: int) -> str:
        """Returns the name of the same Megatron parameter so many layers later."""
        return _LAYER.sub(lambda match: str(int(match.group()) + by), parameter)

    def token_classifier(self, dims: ModelDims) -> tuple[Family, ModelDims]:
        """Returns the family's `ForTokenClassification`, and its dimensions.

        It has a scalar head in place of the output, so that there is nothing to tie.
        """
        head = Row("replicated", ("output_layer.weight",), (HfTensor(SCORE, ("scores", "hidden")),))
        rows = [row for row in self.rows if row.hf[0].name != self.output]
        family = replace(self, rows=(*rows, head), output=SCORE)
        return family, replace(dims, tied_embeddings=False)

    @cached_property
    def _by_megatron_name(self) -> dict[str, Row]:
        return {name: row for row in self.rows for name in row.megatron}
