"""A command is started again as often as allowed, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SUPERVISE = """\
import os, sys
from megatron_oreal.rollout.supervise import supervise
program, restarts, *arguments = sys.argv[1:]
sys.exit(supervise([sys.executable, "-c", program, *arguments], os.environ, int(restarts)))
"""
# Leaves a process in its group, says that it ran, and ends as told.
DIES = """\
import os, subprocess, sys
rest = subprocess.Popen(["sleep", "600"])
with open(sys.argv[1], "a") as file:
    print(rest.pid, file=file)
os.kill(os.getpid(), 9)
"""
WAITS = """\
import sys, time
open(sys.argv[1], "a").close()
time.sleep(600)
"""


def supervised(program: str, restarts: int, file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, program, str(restarts), str(file)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )


def test_what_dies_is_started_again_and_its_rest_is_killed(tmp_path: Path) -> None:
    with supervised(DIES, 2, tmp_path / "ran") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    rests = [int(line) for line in (tmp_path / "ran").read_text().split()]
    assert len(rests) == 3
    assert not any(psutil.pid_exists(pid) for pid in rests)
    assert [line.split(";")[-1] for line in said.splitlines()] == [
        " started again, 1 more times at most",
        " started again, 0 more times at most",
    ]


def test_a_signal_ends_both(tmp_path: Path) -> None:
    with supervised(WAITS, 2, tmp_path / "ran") as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ran").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said == ""
