"""Where one iteration's time and memory went: a torch trace a phase, and memory at its ends."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_oreal.monitor.run_folder import atomic_write

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from torch.autograd.profiler_util import EventList

GIB = 1 << 30


class PhaseMemory(msgspec.Struct, frozen=True):
    """One phase: its seconds, and GiB that the process held; of the device 0 where there is none.

    `host_gib` is resident memory, `device_gib` what torch has allocated; `device_peak_gib` the most
    of it within the phase. An engine's memory that sleeps or is its own allocator's is not in it.
    """

    phase: str
    seconds: float
    host_gib_before: float
    host_gib_after: float
    device_gib_before: float
    device_gib_after: float
    device_peak_gib: float


class IterationProfile:
    """Records phases as they run; not collective.

    Args:
        traced: phases that leave a trace; of the others there is memory alone.
    """

    def __init__(self, traced: Collection[str]) -> None:
        self._traced = frozenset(traced)
        self._traces: dict[str, profile] = {}
        self._memory: list[PhaseMemory] = []
        self.busy_s = 0.0
        """Seconds that this rank worked in traced phases and did not wait for others: kernels but
        for NCCL's on a device, processor time of the calling thread on a CPU."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records the `with` block."""
        _reset_peak()
        before, started = (host_gib(), device_gib()), time.perf_counter()
        if name in self._traced:
            with self._trace(name):
                yield
        else:
            yield
        seconds, (host, device) = time.perf_counter() - started, before
        after = (host_gib(), device, device_gib(), device_peak_gib())
        self._memory.append(PhaseMemory(name, seconds, host, *after))

    @contextmanager
    def _trace(self, name: str) -> Iterator[None]:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        worked = time.thread_time()
        with profile(activities=activities, profile_memory=True, acc_events=True) as trace:
            yield
        worked = time.thread_time() - worked
        kernels = _kernel_s(trace.key_averages()) if torch.cuda.is_available() else 0.0
        self.busy_s += kernels or worked
        self._traces[name if name not in self._traces else f"{name}_{len(self._traces)}"] = trace

    def write(self, folder: Path, rank: int) -> None:
        """Writes `rank_<rank>.<phase>.trace.json.gz` and `rank_<rank>.memory.json`.

        The traces open in Perfetto (ui.perfetto.dev) and in chrome://tracing.

        Raises:
            OSError: The file system refuses.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, trace in self._traces.items():
            trace.export_chrome_trace(str(folder / f"rank_{rank}.{name}.trace.json.gz"))
        rows = msgspec.json.format(msgspec.json.encode(self._memory), indent=1)
        atomic_write(folder / f"rank_{rank}.memory.json", (rows, b"\n"))


def memory_metrics() -> dict[str, float]:
    """Returns what this process holds, and the most it held of the device since the last call."""
    metrics = {"memory/host_gib": host_gib()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        metrics["memory/device_used_gib"] = (total - free) / GIB
        metrics["memory/device_peak_gib"] = device_peak_gib()
        _reset_peak()
    return metrics


def host_gib() -> float:
    """Returns the resident memory of this process in GiB."""
    return psutil.Process().memory_info().rss / GIB


def device_gib() -> float:
    """Returns what torch has allocated on this rank's device in GiB, 0 where there is none."""
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def device_peak_gib() -> float:
    """Returns the most of it since the last reset."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _kernel_s(events: EventList) -> float:
    """Returns the seconds of all kernels that are no communication."""
    own = (e.self_device_time_total for e in events if not e.key.startswith("nccl"))
    return sum(own) / 1e6
