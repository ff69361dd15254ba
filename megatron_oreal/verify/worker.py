"""A verification worker: reads pairs from stdin, writes comparisons to stdout.

Run as `python -m megatron_oreal.verify.worker`. The process is made to be killed: it holds no state
between pairs, and the kernel ends it when a pair takes too much processor time (`SIGPROF`) or when
its parent dies (`SIGKILL`). It can write to no file, run no text and reach no network (sealing.py),
and what a library prints goes nowhere.
Start-up errors are written to stderr and end the process before it says that it is ready.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING

from megatron_oreal.verify.protocol import READY_LINE, Pair, decode_request, encode_reply
from megatron_oreal.verify.registry import load
from megatron_oreal.verify.sealing import seal

if TYPE_CHECKING:
    from io import FileIO

_PR_SET_PDEATHSIG = 1
_ORDINARY = (
    r"2\sqrt{3}-1",
    r"x^2+\frac{3}{4}x",
    r"\frac{\pi}{6}",
    r"y=2x-1",
    r"e^{2}(3+4i)",
    r"\log_2 5\cdot\sin(x)",
)


def main() -> None:
    """Answers requests until stdin ends."""
    args = _arguments()
    _die_with_parent(args.parent_pid)
    _ignore_requests_to_stop()
    _limit_resources(args.memory_bytes)
    verifiers = {name: load(name) for name in args.verifiers}
    if "math" in verifiers:  # builds the grammar's tables, which the first pairs would pay for
        for text in _ORDINARY:
            verifiers["math"](Pair(gold=text, answer=f"{text}+1-1"), 0.0)
    replies = _take_over_stdout()
    seal()
    replies.write(READY_LINE)
    for line in sys.stdin.buffer:
        number, pair = decode_request(line)
        _allow_cpu_time(args.cpu_deadline_s)
        reply = encode_reply(number, verifiers[pair.verifier](pair, args.tolerance))
        _allow_cpu_time(0.0)
        replies.write(reply)


def _arguments() -> argparse.Namespace:
    """Returns what the parent set on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--cpu-deadline-s", type=float, required=True, help="CPU time of one pair")
    parser.add_argument("--memory-bytes", type=int, required=True, help="address space")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative, of decimals")
    parser.add_argument("--verifiers", nargs="+", default=["math"], help="names in the registry")
    return parser.parse_args()


def _die_with_parent(parent_pid: int) -> None:
    """Asks the kernel for `SIGKILL` when the thread that started this process ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit("the parent died before this worker had started")


def _ignore_requests_to_stop() -> None:
    """Leaves to the parent what a scheduler asks of every process of a job.

    The parent finishes its iteration first, and needs this worker for it.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _limit_resources(memory_bytes: int) -> None:
    """Bounds the address space and forbids files and core dumps."""
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, amount: int) -> None:
    """Sets a soft limit, or leaves it at a hard limit below it."""
    _, hard = resource.getrlimit(kind)
    soft = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (soft, hard))


def _take_over_stdout() -> FileIO:
    """Returns the pipe to the parent, unbuffered; stdout and stderr lead nowhere from here on."""
    logging.disable()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    os.close(nowhere)
    return replies


def _allow_cpu_time(seconds: float) -> None:
    """Lets the kernel end this process after so much more processor time; 0 stops the clock.

    `RLIMIT_CPU` counts whole seconds: it stands behind the timer, which counts finely.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1)


if __name__ == "__main__":
    main()
