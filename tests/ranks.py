"""Real process groups for tests, on the CPU: pools of gloo ranks kept warm for the session."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import shutil
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

STARTUP_TIMEOUT_S = 180  # the first import of torch and Megatron, on a cold and busy machine
COLLECTIVE_TIMEOUT_S = 60
CALL_TIMEOUT_S = 240
GRACE_S = 3  # what the other ranks get to fail as well, once one has


class RankError(AssertionError):
    """Some rank raised, died or did not answer; holds the traceback of each that did."""


class RankPool:
    """`size` processes that share one gloo world; the functions they run come from test modules.

    Values travel by plain pickle, between a test and its own children only, so that a tensor
    arrives as a copy and needs no shared memory.
    """

    def __init__(self, size: int) -> None:
        """Starts the ranks and waits until all of them have joined the world."""
        self.size = size
        context = multiprocessing.get_context(
            "forkserver"
        )  # imports once, then forks: no CUDA here
        context.set_forkserver_preload(["torch", "megatron_oreal.parallel.topology"])
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._pipes: list[Connection] = []
        self._processes: list[ForkServerProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, self._folder / "store", theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(STARTUP_TIMEOUT_S)

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        vpp: int = 1,
    ) -> list[Any]:
        """Runs `fn(*args)` on every rank under a fresh Megatron layout; the results by rank.

        Data parallelism fills what `tp * pp * cp` leaves of the pool. Every call starts from the
        same random seed.

        Raises:
            RankError: If a rank raised, died or did not answer. The pool is then closed, since
                its ranks may be out of step.
        """
        layout = {"tensor": tp, "pipeline": pp, "context": cp, "virtual_pipeline": vpp}
        call = pickle.dumps((fn, args, layout))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        return self._collect(CALL_TIMEOUT_S)

    def _collect(self, timeout_s: float) -> list[Any]:
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                errors |= dict.fromkeys(waiting.values(), "no answer in time")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                ok, value = self._receive(rank)
                (answers if ok else errors)[rank] = value
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if errors:
            self.close()
            raise RankError("\n".join(f"--- rank {r} ---\n{errors[r]}" for r in sorted(errors)))
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join(GRACE_S)
            return False, f"died with exit code {self._processes[rank].exitcode}"

    @property
    def alive(self) -> bool:
        """Whether every rank can still take a call."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Ends all ranks; may be called twice."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            process.close()
            pipe.close()
        self._processes, self._pipes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)


class RankPools:
    """One pool for each size, started when first asked for and replaced once it has failed."""

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._pools: dict[int, RankPool] = {}

    def __call__(self, size: int) -> RankPool:
        """Returns a living pool of `size` ranks."""
        if size not in self._pools or not self._pools[size].alive:
            self._pools[size] = RankPool(size)
        return self._pools[size]

    def close(self) -> None:
        """Ends every pool."""
        for pool in self._pools.values():
            pool.close()


def _serve(rank: int, size: int, store: Path, pipe: Connection) -> None:
    """Joins the world and answers calls; the imports are here as the test process needs none."""
    import torch
    import torch.distributed as dist

    from megatron_oreal.parallel import topology

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            fn, args, layout = pickle.loads(pipe.recv_bytes())
            topology.initialize(**layout)
            torch.manual_seed(0)
            answer = pickle.dumps((True, fn(*args)))
            _forget_models()
            topology.destroy()
        except EOFError as closed:
            raise SystemExit(0) from closed
        except BaseException as error:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            raise SystemExit(1) from error
        pipe.send_bytes(answer)


def _forget_models() -> None:
    """Frees the models of a call: they hold process groups, each with threads that never rest.

    The distributed optimizer's views of fp32 parameters lead, through autograd nodes that the
    garbage collector cannot see, to gradient hooks and from these back to model and optimizer;
    rotary embeddings lie in a cache of their class.
    """
    from megatron.core.models.common.embeddings import RotaryEmbedding
    from megatron.core.optimizer import MegatronOptimizer

    RotaryEmbedding.forward.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    for found in gc.get_objects():
        if isinstance(found, MegatronOptimizer):
            vars(found).clear()
    gc.collect()
    gc.freeze()  # what is left are modules: looking through them again would take most of a call
