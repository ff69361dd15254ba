"""One verification worker as its parent sees it: start, send a pair, read a reply, kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import megatron_oreal
from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import (
    MAX_REPLY_BYTES,
    READY_LINE,
    Comparison,
    Pair,
    ProtocolError,
    decode_reply,
    encode_request,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

START_DEADLINE_S = 120.0  # imports from a busy network file system
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH")  # what python itself may need to start
_LAST_BREATH_S = 1.0  # between the end of the pipe and the end of the process
_CPU_SIGNALS = (signal.SIGPROF, signal.SIGXCPU)


class WorkerStartError(RuntimeError):
    """A worker ended, or its time was up, before it could take a pair."""


class WorkerProcess:
    """A child process that compares one pair at a time.

    Attributes:
        ready: it has said that it can take pairs.
        item: the caller's number of the pair it holds, None while idle.
        deadline: `time.monotonic()` at which it has overrun: its start, or the pair it holds.
    """

    def __init__(
        self,
        cpu_deadline_s: float,
        wall_deadline_s: float,
        memory_bytes: int,
        tolerance: float,
        verifiers: Sequence[str],
    ) -> None:
        """Starts the child and returns before it is ready."""
        self._cpu_deadline_s = cpu_deadline_s
        self._wall_deadline_s = wall_deadline_s
        self._process = subprocess.Popen(
            [
                *_command(cpu_deadline_s, memory_bytes),
                f"--tolerance={tolerance}",
                "--verifiers",
                *verifiers,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            close_fds=True,
            cwd="/",
            env=_environment(),
            start_new_session=True,  # an interrupt at the terminal is the trainer's business
        )
        self._received = b""
        self._sent_at = time.monotonic()
        self.ready = False
        self.item: int | None = None
        self.deadline = self._sent_at + START_DEADLINE_S

    def fileno(self) -> int:
        """Returns the descriptor that becomes readable when the worker has spoken or died."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def idle(self) -> bool:
        """Whether it can take a pair."""
        return self.ready and self.item is None

    @property
    def dead(self) -> bool:
        """Whether the child has ended."""
        return self._process.poll() is not None

    def send(self, item: int, pair: Pair) -> None:
        """Hands over a pair; a worker that has died meanwhile shows it at the next `receive`."""
        assert self._process.stdin is not None
        self.item = item
        self._sent_at = time.monotonic()
        self.deadline = self._sent_at + self._wall_deadline_s
        with suppress(BrokenPipeError):
            self._process.stdin.write(encode_request(item, pair))

    def receive(self) -> Comparison | None:
        """Reads what there is and returns the comparison of the pair it holds, if that is complete.

        A worker that has died or talks nonsense is killed, and its pair is UNVERIFIED. Call only
        when `fileno` is readable.

        Raises:
            WorkerStartError: it died before it was ready.
        """
        chunk = os.read(self.fileno(), MAX_REPLY_BYTES)
        self._received += chunk
        if not chunk:
            return self._died()
        if not self._received.endswith(b"\n"):
            return self.give_up("it wrote too much") if self._wrote_too_much() else None
        line, self._received = self._received, b""
        if not self.ready:
            self.ready = line == READY_LINE
            return None if self.ready else self._died()
        return self._finish(line)

    def give_up(self, reason: str) -> Comparison | None:
        """Kills the worker; the pair it holds, if any, is UNVERIFIED for this reason."""
        self.kill()
        item, self.item = self.item, None
        if item is None:
            return None
        return Comparison(Outcome.UNVERIFIED, reason, time.monotonic() - self._sent_at)

    def overran(self) -> Comparison | None:
        """Kills a worker whose deadline has passed.

        Raises:
            WorkerStartError: it was still starting.
        """
        if not self.ready:
            self.kill()
            raise WorkerStartError(f"a worker was not ready after {START_DEADLINE_S:g} s")
        return self.give_up(f"more than {self._wall_deadline_s:g} s of wall time")

    def kill(self) -> None:
        """Ends the child and collects it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _finish(self, line: bytes) -> Comparison | None:
        if self.item is None:
            return self.give_up("it spoke unasked")
        try:
            comparison = decode_reply(line, self.item, time.monotonic() - self._sent_at)
        except ProtocolError as error:
            return self.give_up(f"the worker broke: {error}")
        self.item = None
        return comparison

    def _wrote_too_much(self) -> bool:
        return len(self._received) > MAX_REPLY_BYTES

    def _died(self) -> Comparison | None:
        if not self.ready:
            assert self._process.stderr is not None
            self._process.kill()
            last_words = self._process.stderr.read().decode(errors="replace").strip()[-2000:]
            self.kill()
            raise WorkerStartError(f"a verification worker could not start: {last_words}")
        try:
            code = self._process.wait(_LAST_BREATH_S)
        except subprocess.TimeoutExpired:
            return self.give_up("it closed its pipe")
        if -code in _CPU_SIGNALS:
            return self.give_up(f"more than {self._cpu_deadline_s:g} s of processor time")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return self.give_up(f"the worker died: {how}")


def _command(cpu_deadline_s: float, memory_bytes: int) -> list[str]:
    return [
        *(sys.executable, "-P", "-s", "-B", "-m", "megatron_oreal.verify.worker"),
        f"--parent-pid={os.getpid()}",
        f"--cpu-deadline-s={cpu_deadline_s}",
        f"--memory-bytes={memory_bytes}",
    ]


def _environment() -> dict[str, str]:
    """Returns the whole environment of a worker; the fixed hash seed makes verdicts repeatable."""
    root = str(Path(megatron_oreal.__file__ or "").resolve().parents[1])
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONPATH": root, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
