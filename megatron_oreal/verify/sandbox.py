"""A pool of verification workers that the trainer can always get back from.

Workers are processes, started once and reused; each compares one pair at a time. A pair that
overruns its deadline or takes its worker down is UNVERIFIED; the worker is replaced while a spare,
already warm, steps in. One thread a worker waits for it, so that pairs are compared while the
trainer does something else; the threads do nothing but wait.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from megatron_oreal.config.errors import UserError
from megatron_oreal.types import Outcome
from megatron_oreal.verify.futures import known, results
from megatron_oreal.verify.protocol import MAX_TEXT_CHARS, Comparison, Pair
from megatron_oreal.verify.worker_process import WorkerProcess, WorkerStartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

WORKER_MEMORY_BYTES = 2 << 30
_SPARES = 1
_MAX_FAILED_STARTS = 3  # in a row: the installation is broken, not one worker unlucky


class WorkerPool:
    """Compares pairs in child processes, which die with the thread that started them.

    That is the pool's maker, which has to outlive it, or one of the pool's own.
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
        self._limits = (cpu_deadline_s, wall_deadline_s, memory_bytes, tolerance, verifiers)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._lock = threading.Lock()
        self._closed = False
        self._processes: set[WorkerProcess] = set()
        # More than there are threads to take one, so never empty; the warm ones in front.
        self._idle: deque[WorkerProcess] = deque()
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
        """Kills all workers; what waits is cancelled, and the pool can compare no more."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.end()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._processes.clear()

    def submit(self, pair: Pair) -> Future[Comparison]:
        """Begins to compare a pair; one longer than `MAX_TEXT_CHARS` is UNVERIFIED at once.

        The future fails with `WorkerStartError` where the workers cannot start.
        """
        if max(len(pair.gold), len(pair.answer)) > MAX_TEXT_CHARS:
            reason = f"longer than {MAX_TEXT_CHARS} characters"
            return known(Comparison(Outcome.UNVERIFIED, reason))
        return self._threads.submit(self._compare, pair)

    def compare(
        self, pairs: Sequence[Pair], advance: Callable[[int], None] | None = None
    ) -> list[Comparison]:
        """Compares all pairs and returns the comparisons in their order.

        Args:
            pairs: gold answers and answers.
            advance: told that one more pair is done, after each.

        Raises:
            WorkerStartError: the workers cannot start.
        """
        return results([self.submit(pair) for pair in pairs], advance)

    def _compare(self, pair: Pair) -> Comparison:
        process = self._take()
        comparison = process.compare(pair)
        if process.dead:
            self._replace(process)
        else:
            self._idle.appendleft(process)
        return comparison

    def _take(self) -> WorkerProcess:
        """Returns an idle worker that is alive and ready.

        Raises:
            WorkerStartError: several starts in a row have failed.
        """
        failed = 0
        while True:
            if self._closed:
                raise WorkerStartError("the pool of verification workers is closed")
            process = self._idle.popleft()
            try:
                process.await_ready()
            except WorkerStartError:
                failed += 1
                if failed >= _MAX_FAILED_STARTS:
                    raise
            if not process.dead:
                return process
            self._replace(process)

    def _start(self) -> None:
        with self._lock:
            if not self._closed:
                process = WorkerProcess(*self._limits)
                self._processes.add(process)
                self._idle.append(process)

    def _replace(self, process: WorkerProcess) -> None:
        """Buries a worker and starts another."""
        process.kill()
        with self._lock:
            self._processes.discard(process)
        self._start()
