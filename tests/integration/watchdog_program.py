"""Ranks that go through phases under a watchdog, one of them to its bad end.

`python -m tests.integration.watchdog_program FOLDER FAULT`, under RANK and WORLD_SIZE.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from megatron_oreal.config.schema_health import WatchdogConfig
from megatron_oreal.monitor import watchdog
from megatron_oreal.parallel.collectives import (
    all_gather_bytes,
    barrier,
    start_world,
    stop_world,
    world_rank,
    world_size,
)

BAD_RANK = 1
DEADLINE_S = 3.0


def spill() -> None:
    raise RuntimeError("spilled ink")


FAULTS = {
    "sleep": lambda: time.sleep(600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "lock": lambda: ctypes.PyDLL(None).sleep(600),  # in C, with the interpreter's lock
    "abandon": lambda: time.sleep(600),
    "raise": spill,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def main(folder: Path, fault: str) -> None:
    watchdog._ANSWER_S = watchdog._LOCKED_S = 3.0  # in tests, seconds are long
    start_world()
    # The bad rank is in a phase with more time: it ends because the others do.
    train_s = DEADLINE_S * 20 if fault == "abandon" else DEADLINE_S
    deadlines = WatchdogConfig(train_s=train_s, save_s=DEADLINE_S * 10)
    dog = watchdog.Watchdog(folder, world_rank(), world_size(), deadlines)
    with dog.first_error_only():
        dog.begin(4)
        with dog.phase("generate"):
            all_gather_bytes(b"tokens")
            if fault == "abandon" and world_rank() == 0:  # one rank alone was asked to stop
                dog.abandon_at(time.monotonic() + 1.0)
        slow = "policy" if fault == "lock" else "record"
        with dog.phase(slow):
            if world_rank() == BAD_RANK:
                FAULTS[fault]()
        with dog.phase("policy"):
            barrier()
    dog.close()
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
