"""The server's end of a weight transfer over gloo: an engine in vLLM's own weight-transfer API.

The trainer's first rank broadcasts whole Hugging Face tensors to all workers of all servers, some
of them with each call of `update_weights`; vLLM's layerwise reload cuts and packs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_oreal.rollout.gloo_group import GlooGroup
from megatron_oreal.rollout.vllm_live import LiveCheck, with_tied_head
from megatron_oreal.weights.sums import Checksums, differing, whole_sum

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the group meets; `rank_offset` is the rank of this server's first worker."""

    address: str
    port: int
    rank_offset: int
    world_size: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one call, in the order in which they are broadcast."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    check: bool = False


@dataclass
class _Arrived:
    """What a checked update has brought so far."""

    live: LiveCheck
    sums: Checksums = field(default_factory=dict)


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives weights from a trainer and loads them; lives in a worker of a server."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what vLLM passes."""
        super().__init__(*args, **kwargs)
        self._group: GlooGroup | None = None
        self._arrived = _Arrived(LiveCheck(self.model))

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the trainer's group, in place of that of a trainer before it."""
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = GlooGroup.join(init_info.address, init_info.port, rank, init_info.world_size)

    def start_weight_update(self) -> None:
        """Lets vLLM take tensors in the form of a checkpoint."""
        self._arrived = _Arrived(LiveCheck(self.model))
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives and loads the tensors of one call."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receives and loads the tensors of one call."""
        tied = self.model_config.hf_config.tie_word_embeddings
        tensors = with_tied_head(self._received(update_info), tied)
        if update_info.check:
            tensors = self._arrived.live.noted(tensors)
        model: Any = self.model
        model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        """Has vLLM process what is complete only now."""
        finalize_layerwise_reload(self.model, self.model_config)

    def differing(self, expected: Checksums) -> list[str]:
        """Returns the names of tensors that arrived or are computed with otherwise.

        After an update whose every call was to be checked.
        """
        return [*differing(expected, self._arrived.sums), *self._arrived.live.differing()]

    def shutdown(self) -> None:
        """Leaves the group."""
        self._group = None

    def _received(self, update_info: GlooUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        if self._group is None:
            raise RuntimeError("init_weight_transfer_engine comes first")
        for name, dtype, shape in zip(
            update_info.names, update_info.dtypes, update_info.shapes, strict=True
        ):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            self._group.broadcast(tensor)
            if update_info.check:
                self._arrived.sums[name] = whole_sum(tensor)
            yield name, tensor
