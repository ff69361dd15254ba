"""The trainer's end of a weight transfer to rollout servers, on the world's first rank."""

from __future__ import annotations

import json
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from megatron_oreal.rollout.gloo_group import GlooGroup, address_towards, open_store
from megatron_oreal.rollout.server_client import Server, alongside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from megatron_oreal.weights.sums import Checksums


class Link(Protocol):
    """A way for whole tensors from this rank to all workers of all servers."""

    fleet: Fleet

    def carry(self, tensors: Iterator[tuple[str, torch.Tensor]], *, check: bool) -> None:
        """Replaces all weights of all servers, which must be paused.

        Raises:
            UserError: A server fails.
        """
        ...

    def differing(self, expected: Checksums) -> list[str]:
        """Returns the names of tensors that a server has not as expected, after a checked carry."""
        ...


class Fleet:
    """All servers of a run, their workers numbered through: the trainer is 0, workers follow."""

    def __init__(self, servers: Sequence[Server]) -> None:
        """Asks each server for its number of workers."""
        self.servers = servers
        sizes = [server.get("/get_world_size")["world_size"] for server in servers]
        *self.first_ranks, self.world_size = accumulate(sizes, initial=1)

    @property
    def trainer_address(self) -> str:
        """An address of this machine that all servers can reach; loopback if all are here."""
        addresses = [address_towards(*server.address) for server in self.servers]
        return next((a for a in addresses if not a.startswith("127.") and a != "::1"), addresses[0])

    def everywhere(self, path: str, body: Mapping[str, Any] | None = None) -> list[Any]:
        """Asks all servers the same, at the same time."""
        return alongside([partial(server.post, path, body) for server in self.servers])

    def joins(self, meeting: Mapping[str, Any]) -> list[partial[Any]]:
        """Returns the calls that have each server's workers join a group, under their ranks."""
        path = "/init_weight_transfer_engine"
        return [
            partial(server.post, path, {"init_info": {**meeting, "rank_offset": first_rank}})
            for server, first_rank in zip(self.servers, self.first_ranks, strict=True)
        ]

    def ask_workers(self, method: str, *arguments: str) -> list[list[Any]]:
        """Returns what a method of `vllm_served.ServedModel` returns, by server and worker."""
        return alongside([partial(s.ask_workers, method, *arguments) for s in self.servers])


class GlooLink:
    """A gloo group of the trainer and all workers, through main memory; see `vllm_transfer`."""

    def __init__(self, fleet: Fleet, round_bytes: int) -> None:
        """Has all workers join.

        Args:
            fleet: The servers.
            round_bytes: Bound on what a server is sent by one call.

        Raises:
            UserError: A server refuses, or its workers cannot reach this machine.
        """
        self.fleet, self._round_bytes = fleet, round_bytes
        address, size = fleet.trainer_address, fleet.world_size
        store = open_store(address, size)
        meeting = {"address": address, "port": store.port, "world_size": size}
        groups: list[GlooGroup] = []
        alongside(fleet.joins(meeting), lambda: groups.append(GlooGroup(store, 0, size, address)))
        (self._group,) = groups

    def carry(self, tensors: Iterator[tuple[str, torch.Tensor]], *, check: bool) -> None:
        """See `Link.carry`."""
        self.fleet.everywhere("/start_weight_update")
        for chunk in chunks(tensors, self._round_bytes):
            info = {
                "names": list(chunk),
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in chunk.values()],
                "shapes": [list(tensor.shape) for tensor in chunk.values()],
                "check": check,
            }
            servers, body = self.fleet.servers, {"update_info": info}
            calls = [partial(server.post, "/update_weights", body) for server in servers]
            alongside(calls, partial(self._broadcast, chunk))
        self.fleet.everywhere("/finish_weight_update", {})

    def differing(self, expected: Checksums) -> list[str]:
        """See `Link.differing`."""
        answers = self.fleet.ask_workers("oreal_differing", json.dumps(expected))
        return [name for workers in answers for names in workers for name in names]

    def _broadcast(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            self._group.broadcast(tensor.cpu().contiguous())


def chunks(
    tensors: Iterator[tuple[str, torch.Tensor]], limit: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields runs of tensors of at most `limit` bytes; a larger tensor comes alone."""
    chunk: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if chunk and sum(held.nbytes for held in chunk.values()) + tensor.nbytes > limit:
            yield chunk
            chunk = {}
        chunk[name] = tensor
    if chunk:
        yield chunk
