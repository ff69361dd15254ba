"""A pool of verification workers that the trainer can always get back from.

Workers are started once and reused, each compares one pair at a time. A pair that overruns its
deadline or takes its worker down is UNVERIFIED; the worker is replaced while a spare, already warm,
steps in. The parent uses no threads.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from megatron_oreal.config.errors import UserError
from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import MAX_TEXT_CHARS, Comparison, Pair
from megatron_oreal.verify.worker_process import WorkerProcess, WorkerStartError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

WORKER_MEMORY_BYTES = 2 << 30
_SPARES = 1
_MAX_FAILED_STARTS = 3  # in a row: the installation is broken, not one worker unlucky


@dataclass
class _Batch:
    """One call of `compare`: what waits, and what is known."""

    pairs: Sequence[Pair]
    results: dict[int, Comparison] = field(default_factory=dict)
    waiting: deque[int] = field(default_factory=deque)


class WorkerPool:
    """Compares pairs in child processes.

    Used from one thread, the one that made it: the workers die with that thread.
    """

    def __init__(
        self,
        workers: int,
        cpu_deadline_s: float,
        wall_deadline_s: float,
        memory_bytes: int = WORKER_MEMORY_BYTES,
        *,
        tolerance: float = 0.0,
        verifiers: Sequence[str] = ("math",),
    ) -> None:
        """Starts the workers and one spare, and returns before they are ready.

        Args:
            workers: pairs compared at the same time.
            cpu_deadline_s: processor time of one pair.
            wall_deadline_s: wall time of one pair.
            memory_bytes: address space of one worker.
            tolerance: relative difference allowed between numbers of which one is a decimal.
            verifiers: names in the registry that pairs may ask for.

        Raises:
            UserError: math-verify is not installed.
        """
        if find_spec("math_verify") is None:
            raise UserError("verifier: math_verify is not installed: pip install 'math-verify'")
        self._workers = workers
        self._limits = (cpu_deadline_s, wall_deadline_s, memory_bytes, tolerance, verifiers)
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._processes: list[WorkerProcess] = []
        for _ in range(workers + _SPARES):
            self._start()

    def __enter__(self) -> Self:
        """Returns the pool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the pool."""
        self.close()

    def close(self) -> None:
        """Kills all workers; the pool can compare no more."""
        for process in self._processes:
            self._selector.unregister(process)
            process.kill()
        self._processes.clear()
        self._selector.close()

    def compare(
        self, pairs: Sequence[Pair], progress: Callable[[int], None] | None = None
    ) -> list[Comparison]:
        """Compares all pairs and returns the comparisons in their order.

        Args:
            pairs: gold answers and answers; one longer than `MAX_TEXT_CHARS` is UNVERIFIED at once.
            progress: called with the number of pairs done so far, after each.

        Raises:
            WorkerStartError: the workers cannot start.
        """
        batch = _Batch(pairs)
        try:
            for done, (item, comparison) in enumerate(self._comparisons(batch), start=1):
                batch.results[item] = comparison
                if progress is not None:
                    progress(done)
        finally:  # a worker left with a pair would answer it in the next call
            for process in [p for p in self._processes if p.item is not None]:
                process.give_up("abandoned")
                self._replace(process)
        return [batch.results[item] for item in range(len(pairs))]

    def _comparisons(self, batch: _Batch) -> Iterator[tuple[int, Comparison]]:
        """Yields each pair's number and comparison as they come."""
        for item, pair in enumerate(batch.pairs):
            if max(len(pair.gold), len(pair.answer)) > MAX_TEXT_CHARS:
                reason = f"longer than {MAX_TEXT_CHARS} characters"
                yield item, Comparison(Outcome.UNVERIFIED, reason)
            else:
                batch.waiting.append(item)
        while batch.waiting or self._busy():
            self._hand_out(batch)
            yield from self._collect()

    def _busy(self) -> int:
        return sum(process.item is not None for process in self._processes)

    def _hand_out(self, batch: _Batch) -> None:
        """Gives waiting pairs to idle workers, to no more at a time than the pool was made for."""
        for process in [p for p in self._processes if p.idle]:
            if not batch.waiting or self._busy() >= self._workers:
                return
            if process.dead:
                self._replace(process)
                continue
            item = batch.waiting.popleft()
            process.send(item, batch.pairs[item])

    def _collect(self) -> Iterator[tuple[int, Comparison]]:
        """Waits until a worker has spoken, died or overrun; yields what became known."""
        pending = [p for p in self._processes if not p.idle]
        wait_s = max(min(p.deadline for p in pending) - time.monotonic(), 0.0)
        spoken = {key.fileobj for key, _ in self._selector.select(wait_s)}
        now = time.monotonic()
        for process in list(self._processes):
            item = process.item
            if process not in spoken and (process.idle or process.deadline > now):
                continue
            comparison = self._hear(process, overran=process not in spoken)
            if process.dead:
                self._replace(process)
            if item is not None and comparison is not None:
                yield item, comparison

    def _hear(self, process: WorkerProcess, *, overran: bool) -> Comparison | None:
        """Returns what a worker said, or how it ended, of the pair it held.

        Raises:
            WorkerStartError: several starts in a row have failed.
        """
        try:
            comparison = process.overran() if overran else process.receive()
        except WorkerStartError:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise
            return None
        self._failed_starts = 0
        return comparison

    def _start(self) -> None:
        process = WorkerProcess(*self._limits)
        self._processes.append(process)
        self._selector.register(process, selectors.EVENT_READ)

    def _replace(self, process: WorkerProcess) -> None:
        """Buries a worker and starts another."""
        self._selector.unregister(process)
        process.kill()
        self._processes.remove(process)
        self._start()
