"""Reads back what a running vLLM model computes with, to compare it with what it was handed.

On a CPU vLLM packs its linear layers and drops their `weight`. A packed layer still answers for it:
applied to a unit vector it returns one column, exactly, since all other products are zero. A column
holds a value of every row, so a stale, swapped or wrongly cut tensor shows in a few of them.

What vLLM rounds to FP8 as it arrives, by one scale a matrix, cannot be equal: it has to be as near
as FP8 allows. Whoever hands it over counts its checksum before vLLM rounds it. Where a kernel has
packed the rounded weight as well, all that is asked is that it was handed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from vllm.model_executor.layers.linear import QKVParallelLinear

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COLUMNS = 64  # of each matrix, evenly spaced, first and last among them
# Of FP8 with three bits of mantissa, half a step: of a number's size, and of the scale near zero.
_ROUNDING, _SMALLEST = 1 / 15, 1 / 1023
_ALL = slice(None)
Columns = Callable[[int], torch.Tensor]
"""Which columns of a matrix of so many are read: their indices, ascending."""


class _Cut(NamedTuple):
    """Rows `local` of a vLLM parameter are `rows` and `columns` of a Hugging Face tensor."""

    local: slice = _ALL
    rows: slice = _ALL
    columns: slice = _ALL


@dataclass(frozen=True)
class _Part:
    """A piece of a Hugging Face tensor that this rank's model holds.

    `read` is None where it cannot be read. What is `rounded` has that scale.
    """

    name: str
    cut: _Cut
    read: Callable[[Columns], torch.Tensor] | None
    rounded: Callable[[], torch.Tensor] | None = None

    def expected(self, tensor: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Returns of the whole tensor what `read` returns of the model."""
        if tensor.ndim == 1:
            return tensor[self.cut.rows].clone()
        piece = tensor[self.cut.rows, self.cut.columns]
        return piece[:, columns(piece.shape[1]).to(piece.device)]

    def holds(self, expected: torch.Tensor, columns: Columns) -> bool:
        """Whether the model has what is expected of it, as far as that can be told."""
        if self.read is None:
            return True
        live = self.read(columns)
        if self.rounded is None:
            return _same(live, expected)
        expected = expected.to(live.device, torch.float32)
        bound = expected.abs() * _ROUNDING + self.rounded() * _SMALLEST
        return bool(((live - expected).abs() <= bound).all())


def with_tied_head(
    tensors: Iterator[tuple[str, torch.Tensor]], tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes the tensors of a checkpoint on, and tied embeddings a second time, as the head.

    On a CPU vLLM packs a copy of them for the head, which would stay as it was.
    """
    for name, tensor in tensors:
        yield name, tensor
        if tied and name == _EMBEDDING:
            yield _HEAD, tensor


class LiveCheck:
    """Notes samples of the tensors that go into a model, then compares the model with them."""

    def __init__(self, model: nn.Module) -> None:
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        for part in _parts(model):
            self._parts[part.name].append(part)
        self._handed: dict[str, list[torch.Tensor]] = {}

    def noted(
        self, tensors: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes whole Hugging Face tensors on to the model and keeps samples of them."""
        for name, tensor in tensors:
            self._handed[name] = [
                part.expected(tensor, _sampled_columns) for part in self._parts[name]
            ]
            yield name, tensor

    @torch.no_grad()
    def differing(self) -> list[str]:
        """Returns the names of tensors not handed, not held by the model, or held otherwise."""
        names = sorted(self._parts.keys() | self._handed.keys())
        return [name for name in names if not self._holds(name)]

    @torch.no_grad()
    def differing_from(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
        """Compares every element that this rank's model holds of whole Hugging Face tensors.

        Returns:
            The names of tensors that it holds otherwise or that only one side has.
        """
        unseen, differing = set(self._parts), []
        for name, tensor in tensors:
            unseen.discard(name)
            parts = self._parts.get(name, ())
            same = (part.holds(part.expected(tensor, torch.arange), torch.arange) for part in parts)
            if not parts or not all(same):
                differing.append(name)
        return sorted([*differing, *unseen])

    def _holds(self, name: str) -> bool:
        parts, samples = self._parts[name], self._handed.get(name, [])
        return len(parts) == len(samples) > 0 and all(
            part.holds(sample, _sampled_columns)
            for part, sample in zip(parts, samples, strict=True)
        )


def _parts(model: nn.Module) -> Iterator[_Part]:
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        names = [f"{parent}.{child}".lstrip(".") for child in fused.get(own, [own])]
        for kind, parameter in module.named_parameters(recurse=False):
            if kind.endswith("_scale"):  # vLLM's own, of what it quantised
                continue
            rounded = parameter.dtype.itemsize == 1
            for name, cut in zip(names, _cuts(module), strict=True):
                if rounded:
                    yield _rounded_part(f"{name}.{kind}", cut, module)
                    continue
                as_matrix = kind == "weight" and (parameter.ndim > 1 or _is_packed(module))
                yield _Part(f"{name}.{kind}", cut, _reader(module, kind, cut, as_matrix))


def _cuts(module: nn.Module) -> list[_Cut]:
    """Returns where the rows of this module's parameters lie in each Hugging Face tensor."""
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, QKVParallelLinear):
        return _qkv_cuts(module)
    if isinstance(module, MergedColumnParallelLinear):
        sizes = module.output_partition_sizes
        return _stacked([(size, module.tp_rank * size) for size in sizes])
    if isinstance(module, RowParallelLinear):
        size = module.input_size_per_partition
        return [_Cut(columns=slice(module.tp_rank * size, (module.tp_rank + 1) * size))]
    if isinstance(module, VocabParallelEmbedding):
        shard = module.shard_indices
        start, stop = shard.org_vocab_start_index, shard.org_vocab_end_index
        return [_Cut(local=slice(0, stop - start), rows=slice(start, stop))]
    return [_Cut()]


def _qkv_cuts(module: QKVParallelLinear) -> list[_Cut]:
    query = module.num_heads * module.head_size
    key = module.num_kv_heads * module.head_size
    key_rank = module.tp_rank // module.num_kv_head_replicas
    return _stacked([(query, module.tp_rank * query), (key, key_rank * key), (key, key_rank * key)])


def _stacked(pieces: list[tuple[int, int]]) -> list[_Cut]:
    """Returns the cuts of pieces stacked in rows: `(number of rows, first row in the tensor)`."""
    cuts, local = [], 0
    for size, start in pieces:
        cuts.append(_Cut(slice(local, local + size), slice(start, start + size)))
        local += size
    return cuts


def _reader(
    module: nn.Module, kind: str, cut: _Cut, as_matrix: bool
) -> Callable[[Columns], torch.Tensor]:
    if as_matrix:
        return lambda columns: _matrix_columns(module, columns)[cut.local]
    return lambda _: getattr(module, kind)[cut.local]


def _rounded_part(name: str, cut: _Cut, module: Any) -> _Part:
    """A matrix in FP8 with one scale, transposed as vLLM's plain kernels have it, or packed."""
    shape = (module.input_size_per_partition, sum(module.output_partition_sizes))
    if tuple(module.weight.shape) != shape or module.weight_scale.numel() != 1:
        return _Part(name, cut, None)

    def read(columns: Columns) -> torch.Tensor:
        bits = module.weight.t()[cut.local].view(torch.uint8)  # not every device indexes FP8
        chosen = bits[:, columns(shape[0]).to(bits.device)].view(module.weight.dtype)
        return chosen.float() * module.weight_scale

    return _Part(name, cut, read, lambda: module.weight_scale)


def _is_packed(module: nn.Module) -> bool:
    """Whether the module computes with a copy of its weight: an embedding looks rows up in it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    looks_up = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    return hasattr(module, "cpu_linear") and not looks_up


def _matrix_columns(module: Any, columns: Columns) -> torch.Tensor:
    """Returns columns of a matrix as the module uses it, `[local rows, number of columns]`."""
    weight: torch.Tensor = module.weight
    if not _is_packed(module):
        return weight[:, columns(weight.shape[1]).to(weight.device)]
    width: int = module.input_size_per_partition
    chosen = columns(width)
    units = torch.zeros(len(chosen), width, dtype=weight.dtype)
    units[torch.arange(len(chosen)), chosen] = 1
    return module.cpu_linear(units, weight, None).T


def _sampled_columns(width: int) -> torch.Tensor:
    count = min(width, _COLUMNS)
    return torch.arange(count) * (width - 1) // max(count - 1, 1)


def _same(live: torch.Tensor, handed: torch.Tensor) -> bool:
    """Compares bit for bit, but for the sign of zero and subnormals, which sums do not keep."""
    live, handed = live.to(handed.dtype), handed.to(live.dtype).to(handed.dtype)
    tiny = torch.finfo(live.dtype).tiny
    return torch.equal(
        live.masked_fill(live.abs() < tiny, 0).to(handed.device),
        handed.masked_fill(handed.abs() < tiny, 0),
    )
