"""Every rank gets every rollout: the exchange after generation, as typed msgpack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from megatron_oreal.parallel.collectives import all_gather_bytes
from megatron_oreal.types import Rollout

if TYPE_CHECKING:
    from collections.abc import Mapping

_Share = dict[int, Rollout]


def all_gather_rollouts(own: Mapping[int, Rollout], n_requests: int) -> list[Rollout]:
    """Returns the rollouts of all ranks in the order of the requests; collective over the world.

    Args:
        own: request index -> rollout, what this rank contributes; no index on two ranks.
        n_requests: number of requests of the whole world.

    Raises:
        RuntimeError: if a request has no rollout or two of them.
    """
    shares = all_gather_bytes(msgspec.msgpack.encode(own))
    rollouts: _Share = {}
    n_received = 0
    for share in shares:
        received = msgspec.msgpack.decode(share, type=_Share)
        n_received += len(received)
        rollouts |= received
    if n_received != n_requests or set(rollouts) != set(range(n_requests)):
        raise RuntimeError(
            f"{n_requests} requests, {n_received} rollouts, {len(rollouts)} answered"
        )
    return [rollouts[index] for index in range(n_requests)]
