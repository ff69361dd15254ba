"""One verification worker as its parent sees it: start, send a pair, read a reply, kill."""

from __future__ import annotations

import os
import select
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
_LAST_BREATH_S = 10.0  # between the end of the pipe and the end of the process, on a busy machine
_CPU_SIGNALS = (signal.SIGPROF, signal.SIGXCPU)


class WorkerStartError(RuntimeError):
    """A worker ended, or its time was up, before it could take a pair."""


class WorkerProcess:
    """A child process that compares one pair at a time; used by one thread at a time.

    Attributes:
        ready: it has said that it can take pairs.
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
        assert self._process.stdout is not None
        self._replies = self._process.stdout.fileno()
        self._readable = select.poll()
        self._readable.register(self._replies, select.POLLIN)
        self._received = b""
        self._number = 0  # of the pair it holds or held
        self._sent_at = time.monotonic()
        self._deadline = self._sent_at + START_DEADLINE_S
        self.ready = False

    @property
    def dead(self) -> bool:
        """Whether the child has ended."""
        return self._process.poll() is not None

    def await_ready(self) -> None:
        """Waits until it can take a pair.

        Raises:
            WorkerStartError: it died, or its time was up, before.
        """
        while not self.ready:
            line = self._next_line()
            if line != READY_LINE:
                raise WorkerStartError(self._last_words(line))
            self.ready = True

    def compare(self, pair: Pair) -> Comparison:
        """Compares a pair; within the deadlines, whatever the worker does.

        A worker that overruns, dies or talks nonsense is killed, and its pair is UNVERIFIED.
        """
        assert self._process.stdin is not None
        self._number += 1
        self._sent_at = time.monotonic()
        self._deadline = self._sent_at + self._wall_deadline_s
        with suppress(BrokenPipeError):  # then its end shows in what it says
            self._process.stdin.write(encode_request(self._number, pair))
        line = self._next_line()
        seconds = time.monotonic() - self._sent_at
        if not line:
            return self._given_up(self._how_it_ended())
        try:
            return decode_reply(line, self._number, seconds)
        except ProtocolError as error:
            return self._given_up(f"the worker broke: {error}")

    def end(self) -> None:
        """Ends the child, from any thread; `kill` has to follow."""
        self._process.kill()

    def kill(self) -> None:
        """Ends the child and collects it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _next_line(self) -> bytes:
        """Returns the next line; empty where it died, wrote too much or the deadline passed."""
        self._received = b""
        while not self._received.endswith(b"\n") and len(self._received) <= MAX_REPLY_BYTES:
            wait_s = max(self._deadline - time.monotonic(), 0.0)
            if not self._readable.poll(1e3 * wait_s):
                return b""
            chunk = os.read(self._replies, MAX_REPLY_BYTES)
            if not chunk:
                return b""
            self._received += chunk
        return self._received

    def _given_up(self, reason: str) -> Comparison:
        self.kill()
        return Comparison(Outcome.UNVERIFIED, reason, time.monotonic() - self._sent_at)

    def _last_words(self, line: bytes) -> str:
        """Kills a worker that is not ready and returns what went wrong."""
        assert self._process.stderr is not None
        late = not line and time.monotonic() >= self._deadline
        self._process.kill()
        said = self._process.stderr.read().decode(errors="replace").strip()[-2000:]
        self.kill()
        if late:
            return f"a verification worker was not ready after {START_DEADLINE_S:g} s"
        return f"a verification worker could not start: {said}"

    def _how_it_ended(self) -> str:
        """Returns why there is no reply."""
        if time.monotonic() >= self._deadline:
            return f"more than {self._wall_deadline_s:g} s of wall time"
        try:
            code = self._process.wait(_LAST_BREATH_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if -code in _CPU_SIGNALS:
            return f"more than {self._cpu_deadline_s:g} s of processor time"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the worker died: {how}"


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
