"""Weights to rollout servers over NCCL, by vLLM's own engines on both ends.

vLLM's engine hands nobody what arrived. What is checked are the live parameters of the servers:
each worker counts those of its parts that it answers for, so that the workers of a server add up to
the whole tensors. That asks for plain parameters, as vLLM's are for dense models on GPUs.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer import (
    ParamMeta,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from megatron_oreal.rollout.server_client import alongside
from megatron_oreal.weights.sums import differing, wrapped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from megatron_oreal.rollout.server_link import Fleet
    from megatron_oreal.weights.plan import TensorSpec
    from megatron_oreal.weights.sums import Checksums


class NcclLink:
    """An NCCL group of the trainer and all workers of all servers; `Link` is its contract."""

    def __init__(self, fleet: Fleet, tensors: Sequence[TensorSpec]) -> None:
        """Has all workers join.

        Args:
            fleet: The servers.
            tensors: What will be sent, in this order.

        Raises:
            UserError: A server refuses.
        """
        self.fleet = fleet
        self._stream = _Stream([ParamMeta(t.name, t.dtype, t.shape) for t in tensors])
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        meeting = NCCLTrainerInitInfo(
            master_address=fleet.trainer_address,
            master_port=port,
            world_size=fleet.world_size,
            rank=0,  # the sender; the trainer's other ranks only help to build tensors
        )
        self._engine = WeightTransferTrainerFactory.trainer_init(
            meeting, client=_Client(fleet), source=self._stream
        )

    def carry(self, tensors: Iterator[tuple[str, torch.Tensor]], *, check: bool) -> None:
        """See `Link.carry`; the servers count only when asked."""
        del check
        self._stream.tensors = tensors
        self._engine.send_weights()

    def differing(self, expected: Checksums) -> list[str]:
        """See `Link.differing`."""
        wrong: set[str] = set()
        for workers in self.fleet.ask_workers("oreal_sums"):
            total = Counter[str]()
            for sums in workers:
                total.update(sums)
            wrong |= set(differing(expected, {name: wrapped(total[name]) for name in total}))
        return sorted(wrong)


class _Stream(WeightSource):
    """The tensors of the push that is under way, once."""

    def __init__(self, metadata: list[ParamMeta]) -> None:
        self._metadata = metadata
        self.tensors: Iterator[tuple[str, torch.Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        """Returns what every push yields."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of the push."""
        return self.tensors


class _Client:
    """vLLM's protocol for talking to one server, towards all of them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Has each server's workers join under their ranks."""
        alongside(self._fleet.joins(init_info))

    def start_weight_update(self) -> None:
        """Begins an update."""
        self._fleet.everywhere("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Has the workers receive what is being sent."""
        self._fleet.everywhere("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends an update."""
        self._fleet.everywhere("/finish_weight_update", {"weight_version": weight_version})
