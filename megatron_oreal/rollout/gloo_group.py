"""A process group of its own between a trainer and the workers of rollout servers.

Rank 0 is the trainer's first rank; the workers follow, server by server. It knows nothing of the
worlds that its members are in otherwise.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  documented

if TYPE_CHECKING:
    import torch

_TIMEOUT = timedelta(seconds=300)  # for a member to join, or for one tensor


def address_towards(host: str, port: int) -> str:
    """Returns this machine's address on its way to a host; sends nothing."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(target)
        return str(way.getsockname()[0])


def open_store(address: str, world_size: int) -> TCPStore:
    """Opens the meeting point of a group on this machine, at a free port."""
    return TCPStore(
        address, 0, world_size, is_master=True, timeout=_TIMEOUT, wait_for_workers=False
    )


class GlooGroup:
    """Broadcasts tensors from rank 0; joining is collective over its members."""

    def __init__(self, store: Store, rank: int, world_size: int, address: str) -> None:
        """Joins the group, under this machine's address that the others can reach."""
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = _TIMEOUT
        self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, options)

    @classmethod
    def join(cls, address: str, port: int, rank: int, world_size: int) -> GlooGroup:
        """Joins a group whose meeting point is on another machine."""
        store = TCPStore(address, port, world_size, is_master=False, timeout=_TIMEOUT)
        return cls(store, rank, world_size, address_towards(address, port))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrites a contiguous CPU tensor with that of rank 0, on all members."""
        self._group.broadcast([tensor], dist.BroadcastOptions()).wait()
