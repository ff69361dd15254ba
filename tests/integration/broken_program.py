"""The command line, with a death or a fault at a moment of a run.

`BREAK='{"phase": "policy", "iteration": 3}' python -m tests.integration.broken_program train ...`

Nothing of the run itself is replaced: what stands around its phases only watches them go by.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from megatron_oreal.checkpoint.folder import folder_name
from megatron_oreal.cli import main
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.loop import OrealLoop

VARIABLE = "BREAK"
FAULT = "RuntimeError: CUDA error: an illegal memory access was encountered"
# Names of saving up to and after the rename that makes a checkpoint of a folder.
SAVE_BEFORE, SAVE_AFTER = "save, before the rename", "save, after the rename"


class Break(msgspec.Struct, frozen=True):
    """Where a run breaks.

    Attributes:
        phase: of the journal, or one of the two above.
        iteration: counted from 0; a checkpoint belongs to the iteration before it.
        delay_s: after the begin of the phase, or after the rename; at the end of the phase, or
            before the rename, at the latest.
        rank: that is killed; None for all of them at once.
        responses: after so many of this rank's, its engine raises, and nobody is killed.
    """

    phase: str
    iteration: int
    delay_s: float = 0.0
    rank: int | None = None
    responses: int | None = None


class Breaker:
    """Waits for the moment; on the rank that dies, or on the first where all do."""

    def __init__(self, plan: Break) -> None:
        self._plan = plan
        self._iteration: int | None = None
        self._armed = False
        self._phase = ""

    def watch(self) -> None:
        """Stands around phases and iterations, and listens for renames."""
        if int(os.environ["RANK"]) != (self._plan.rank or 0):
            return
        phase, iterate = Journal.phase, OrealLoop.iterate

        @contextlib.contextmanager
        def watched_phase(journal: Journal, name: str, *rest: Any) -> Iterator[Any]:
            self._phase = name
            with phase(journal, name, *rest) as advance:
                if self._is_due(name):
                    self._arm()
                yield advance
                if self._armed and name == self._plan.phase:
                    self._kill()

        def watched_iterate(loop: OrealLoop, iteration: int) -> None:
            self._iteration = iteration
            iterate(loop, iteration)

        Journal.phase, OrealLoop.iterate = watched_phase, watched_iterate
        if self._plan.responses is not None:
            self._break_engine(self._plan.responses)
        sys.addaudithook(self._listen)

    def _is_due(self, phase: str) -> bool:
        wanted = "checkpoint" if self._plan.phase == SAVE_BEFORE else self._plan.phase
        due = phase == wanted and self._iteration == self._plan.iteration
        return due and self._plan.responses is None

    def _arm(self) -> None:
        self._armed = True
        timer = threading.Timer(self._plan.delay_s, self._kill)
        timer.daemon = True
        timer.start()

    def _listen(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hears of a rename before it is made."""
        if event != "os.rename" or self._iteration is None:
            return
        saved = folder_name(self._plan.iteration + 1)
        if Path(os.fsdecode(arguments[1])).name == saved:
            if self._plan.phase == SAVE_BEFORE:
                self._kill()
            elif self._plan.phase == SAVE_AFTER:
                self._arm()

    def _kill(self) -> None:
        doomed = [psutil.Process()]
        if self._plan.rank is None:
            doomed = psutil.Process(os.getppid()).children()
        for process in sorted(doomed, key=lambda one: one.pid == os.getpid()):
            process.send_signal(signal.SIGKILL)
        signal.pause()

    def _break_engine(self, responses: int) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        step, left = LLMEngine.step, responses

        def broken_step(engine: LLMEngine) -> Any:
            nonlocal left
            if self._phase == "generate" and self._iteration == self._plan.iteration:
                if left <= 0:
                    raise RuntimeError(FAULT.partition(": ")[2])
                outputs = step(engine)
                left -= len(outputs)
                return outputs
            return step(engine)

        LLMEngine.step = broken_step


if __name__ == "__main__":
    Breaker(msgspec.json.decode(os.environ[VARIABLE], type=Break)).watch()
    sys.exit(main())
