"""Keeps a rollout server alive: starts it again when it ends badly."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType


def supervise(command: Sequence[str], environment: Mapping[str, str], restarts: int) -> int:
    """Runs a command, again each time it fails, and returns how it ended at last.

    SIGTERM and SIGINT are handed on and end it. This process becomes the leader of a process group;
    what a server leaves in it when it dies, an engine that holds a GPU, is killed before the next.

    Args:
        command: Program and arguments.
        environment: All variables.
        restarts: How often it is started again.
    """
    with contextlib.suppress(PermissionError):  # leads a session, and so its group
        os.setpgid(0, 0)
    stopping, child = False, None

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    status = 0
    for left in range(restarts, -1, -1):
        child = subprocess.Popen(command, env=environment)
        status = child.wait()
        _kill_rest()
        if status == 0 or stopping or not left:
            break
        print(  # noqa: T201  beside the server's own log
            f"megatron-oreal: the server ended with status {status}; started again, {left - 1} more"
            " times at most",
            file=sys.stderr,
            flush=True,
        )
    return status if status >= 0 else 128 - status


def _kill_rest() -> None:
    """Kills all other processes of this group, and waits for their end."""
    own, rest = os.getpgrp(), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if process.pid != os.getpid() and os.getpgid(process.pid) == own:
                process.kill()
                rest.append(process)
    psutil.wait_procs(rest, timeout=30)
