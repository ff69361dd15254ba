"""Tensors that wait in host memory while they are not needed, and come back as they were.

Only the memory behind a tensor moves: its storage is emptied and filled again, so that the tensor,
its views, and whatever else refers to them stay valid, at another address on a GPU. Megatron does
the same to its own gradient buffers. On a CPU the copies are plain, and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu, has_gpu

Here = Callable[[], AbstractContextManager[None]]
"""Within its context tensors hold their numbers; contexts may nest."""

stays: Here = nullcontext
"""Tensors that are never away."""


class Parked:
    """Tensors that are on the device within `here` alone.

    Args:
        leave: Moves them away.
        come_back: Undoes it.
    """

    def __init__(self, leave: Callable[[], None], come_back: Callable[[], None]) -> None:
        self._leave, self._come_back, self._users = leave, come_back, 0
        leave()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Brings them back until the block ends; not collective."""
        if not self._users:
            self._come_back()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._leave()


class HostCopies:
    """Pinned copies of storages; host memory is taken once and kept.

    Args:
        tensors: Called at each leave: an optimizer has no moments before its first step.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._tensors = tensors
        self._memory: dict[int, torch.Tensor] = {}
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    def leave(self) -> None:
        """Copies the storages to the host and empties them."""
        storages = {s._cdata: s for s in (t.untyped_storage() for t in self._tensors())}
        self._away = [(s, self._copied(key, s)) for key, s in storages.items() if s.nbytes()]
        if has_gpu():
            torch.cuda.synchronize()
        for storage, _ in self._away:
            storage.resize_(0)
        if has_gpu():
            torch.cuda.empty_cache()  # an engine's own allocator takes what torch gives back

    def come_back(self) -> None:
        """Fills the storages again."""
        for storage, copy in self._away:
            storage.resize_(copy.nbytes)
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self._away = []

    def _copied(self, key: int, storage: torch.UntypedStorage) -> torch.Tensor:
        if key not in self._memory or self._memory[key].nbytes != storage.nbytes():
            self._memory[key] = torch.empty(
                storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda
            )
        return self._memory[key].copy_(_bytes_of(storage), non_blocking=True)


def park(tensors: Callable[[], Iterable[torch.Tensor]], *, wanted: bool) -> Here:
    """Sends tensors to the host, if wanted, and returns what brings them back; not collective."""
    if not wanted:
        return stays
    copies = HostCopies(tensors)
    return Parked(copies.leave, copies.come_back).here


def free_gradients(stages: Iterable[DistributedDataParallel], *, wanted: bool) -> Here:
    """Frees gradient buffers, if wanted, and returns what takes them again, filled with zeros.

    Not collective.
    """
    if not wanted:
        return stays
    chunks = list(stages)

    def leave() -> None:
        with cuda_on_cpu():
            for chunk in chunks:
                chunk.offload_grad_buffers()

    def come_back() -> None:
        with cuda_on_cpu():
            for chunk in chunks:
                chunk.restore_grad_buffers()

    return Parked(leave, come_back).here


@contextmanager
def all_here(*parts: Here) -> Iterator[None]:
    """Brings several parts back until the block ends."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part())
        yield


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]  a storage does
