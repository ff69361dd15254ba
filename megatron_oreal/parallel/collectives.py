"""World-wide exchange of bytes and a barrier; the only collectives that the loop itself uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]  documented

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.pending import collective
from megatron_oreal.parallel.cuda_on_cpu import has_gpu


def start_world(timeout_s: float = 1800.0) -> None:
    """Joins the process group that `torchrun` or `srun` describes; collective over the world.

    A lone process becomes a world of one. Bytes travel by gloo, tensors by NCCL where there are
    GPUs.
    """
    if dist.is_initialized():
        return
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(key, value)
    alone = os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ
    store = HashStore() if alone else None
    if has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpu() else "gloo",
        store=store,
        rank=int(os.environ["RANK"]) if alone else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if alone else -1,
        timeout=timedelta(seconds=timeout_s),
    )


def stop_world() -> None:
    """Leaves the process group; collective over the world, a no-op where none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_rank() -> int:
    """This process's rank in the world."""
    return dist.get_rank()


def world_size() -> int:
    """Number of ranks in the world."""
    return dist.get_world_size()


def barrier() -> None:
    """Waits for every rank; collective over the world."""
    with collective("barrier"):
        dist.barrier()


def all_gather_bytes(payload: bytes) -> list[bytes]:
    """Returns every rank's payload, ordered by rank; collective over the world.

    Payloads may differ in length: each is broadcast at its own size, empty ones not at all.
    """
    with collective(f"all_gather_bytes, {len(payload)} of this rank"):
        return _all_gather_bytes(payload)


def _all_gather_bytes(payload: bytes) -> list[bytes]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(payload)], dtype=torch.int64))
    gathered = []
    for rank, size in enumerate(sizes):
        part = torch.empty(int(size), dtype=torch.uint8)
        if rank == world_rank() and payload:
            part.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        if len(part) and world_size() > 1:
            dist.broadcast(part, src=rank)
        gathered.append(part.numpy().tobytes())
    return gathered


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all ranks of a CPU tensor, any shape; collective over the world."""
    total = values.clone()
    if world_size() > 1:
        with collective(f"all_reduce_sum, {values.numel()} numbers"):
            dist.all_reduce(total)
    return total


def broadcast_bytes(payload: bytes, source: int = 0) -> bytes:
    """Returns the source rank's payload on every rank; collective over the world."""
    return all_gather_bytes(payload if world_rank() == source else b"")[source]


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """Raises on every rank the `UserError` that the block raised on any; collective over the world.

    For checks that ranks may answer differently: what one rank refuses, all refuse alike.
    """
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    found = [text.decode() for text in all_gather_bytes(problem.encode()) if text]
    if found:
        raise UserError(found[0])
