"""A checkpoint on its way to the disk, behind the training.

The training waits for the copy to host memory alone. A thread of each rank writes its copy, forces
it to the disk and reads it back; then, in a thread of rank 0, the folder gets its name. Threads,
not processes: a forked one would inherit the locks that threads of gloo, vLLM and CUDA hold at that
moment, a spawned one would need a second copy. They touch neither live tensors nor process groups.

What comes next is decided by all ranks from the same replies, at the points where they ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import msgspec
from safetensors import SafetensorError

from megatron_oreal.checkpoint import folder as folders
from megatron_oreal.checkpoint.folder import STATE, FileRecord
from megatron_oreal.checkpoint.run_state import RunState
from megatron_oreal.checkpoint.snapshot import NotFinite, Snapshot
from megatron_oreal.config.schema import CheckpointConfig
from megatron_oreal.parallel.collectives import all_gather_bytes, world_rank
from megatron_oreal.weights.hf_io import write_json

REFUSALS = (OSError, SafetensorError, NotFinite)


class Outcome(NamedTuple):
    """What became of a checkpoint: `problem` is empty where it is whole and has its name.

    `seconds` went by on this rank since its copy was taken.
    """

    iteration: int
    problem: str
    seconds: float


class _Share(msgspec.Struct, frozen=True):
    """What a rank wrote, and how many steps its optimizers have seen."""

    files: dict[str, FileRecord]
    steps: dict[str, int]


class _Reply(msgspec.Struct, frozen=True):
    """How far a rank is; without a share, a problem and work under way it has nothing to do."""

    working: bool = False
    problem: str = ""
    share: _Share | None = None


class Saving:
    """One checkpoint from copies to its name; starting it is not collective.

    Args:
        root: the folder of checkpoints, in which rank 0 has opened the partial one.
        state: of the run, but for the steps of its optimizers.
        copies: of this rank, by role.
        settings: what to keep of older checkpoints.
    """

    def __init__(
        self,
        root: Path,
        state: RunState,
        copies: Mapping[str, Snapshot],
        settings: CheckpointConfig,
    ) -> None:
        self._root, self._state, self._settings = root, state, settings
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._started = time.perf_counter()
        self._named = False  # whether the folder is getting its name
        self._work: Future[_Share] | None = self._thread.submit(self._write, copies)

    def advance(self) -> Outcome | None:
        """Returns what became of it, None while a rank is at work; collective over the world."""
        replies = self._exchange()
        if any(reply.working for reply in replies):
            return None
        problem = next((reply.problem for reply in replies if reply.problem), "")
        if problem and world_rank() == 0:
            folders.discard_partial(self._root, self._state.iteration)
        if problem or self._named:
            self._thread.shutdown()
            seconds = time.perf_counter() - self._started
            return Outcome(self._state.iteration, problem, seconds)
        self._named, self._work = True, None
        if world_rank() == 0:
            shares = [reply.share for reply in replies if reply.share]
            self._work = self._thread.submit(self._publish, shares)
        return None

    def settle(self) -> Outcome:
        """Waits until it is whole or has failed; collective over the world."""
        while True:
            if self._work:
                wait([self._work])
            outcome = self.advance()
            if outcome:
                return outcome

    def _exchange(self) -> list[_Reply]:
        """Returns every rank's reply; collective over the world."""
        reply = _reply(self._work) if self._work else _Reply()
        payloads = all_gather_bytes(msgspec.json.encode(reply))
        return [msgspec.json.decode(payload, type=_Reply) for payload in payloads]

    def _write(self, copies: Mapping[str, Snapshot]) -> _Share:
        iteration, files = self._state.iteration, {}
        folder, name = folders.partial_folder(self._root, iteration), folders.folder_name(iteration)
        for role, copy in copies.items():
            path = folder / folders.tensor_file(role, world_rank())
            files[path.name] = copy.write(path, name)
        return _Share(files, {role: copy.steps for role, copy in copies.items()})

    def _publish(self, shares: list[_Share]) -> _Share:
        """Writes what the ranks have agreed on, names the folder, removes old ones; on rank 0."""
        iteration = self._state.iteration
        files = {name: entry for share in shares for name, entry in share.files.items()}
        steps = {role: max(share.steps[role] for share in shares) for role in shares[0].steps}
        path = folders.partial_folder(self._root, iteration) / STATE
        write_json(path, msgspec.structs.replace(self._state, steps=steps))
        files[STATE] = folders.record(path)
        folders.publish(self._root, iteration, files)
        settings = self._settings
        folders.prune(self._root, iteration, settings.keep_last, settings.keep_every)
        return _Share(files, steps)


def _reply(work: Future[_Share]) -> _Reply:
    if not work.done():
        return _Reply(working=True)
    try:
        return _Reply(share=work.result())
    except REFUSALS as error:
        return _Reply(problem=str(error))


def attempt(action: Callable[[], object]) -> str:
    """Does what a file system may refuse on any rank; returns the first problem, empty for none.

    Collective over the world, and so a barrier.
    """
    problem = ""
    try:
        action()
    except REFUSALS as error:
        problem = str(error)
    found = [text.decode() for text in all_gather_bytes(problem.encode()) if text]
    return found[0] if found else ""
