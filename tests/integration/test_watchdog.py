"""What becomes of the other ranks, and of the console, where one hangs, fails or is killed."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests.integration.commands import started

PROGRAM = "tests.integration.watchdog_program"
END_DEADLINE_S = 60.0


@dataclass(frozen=True)
class End:
    """How the ranks ended, `-9` for one that had to be killed; one console for all."""

    statuses: list[int]
    console: str
    folder: Path

    def stacks(self, rank: int) -> str:
        return (self.folder / f"rank_{rank:05d}.stacks.txt").read_text()


def run(folder: Path, ranks: int, fault: str, *, ends: bool = True) -> End:
    """Runs the ranks as `srun` does, without a launcher that ends them all.

    Rank 1, the bad one, is waited for only where it can end.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    line = (sys.executable, "-W", "ignore", "-m", PROGRAM, str(folder), fault)
    with contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []
        for rank in range(ranks):
            world = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(stack.enter_context(started(line, world | meeting)))
        deadline = time.monotonic() + END_DEADLINE_S
        waited_for = [process for rank, process in enumerate(processes) if ends or rank != 1]
        for process in waited_for:
            process.wait(timeout=deadline - time.monotonic())
        for process in processes:
            process.kill()
        console = "".join(process.communicate()[1] for process in processes)
    return End([process.returncode for process in processes], console, folder)


def lines(end: End) -> list[str]:
    return [line for line in end.console.splitlines() if line.startswith("megatron-oreal: ")]


@pytest.mark.parametrize("fault", ["sleep", "stop", "lock"])
def test_the_rank_that_others_wait_for_is_named(tmp_path: Path, fault: str) -> None:
    end = run(tmp_path, 2, fault, ends=fault != "stop")
    assert end.statuses == [1, -signal.SIGKILL if fault == "stop" else 1]
    why, missing, stacks = lines(end)
    assert why.startswith("megatron-oreal: rank 0 has been in policy of 4 for ")
    assert why.endswith(" s, longer than watchdog.train_s=3")
    place = "policy" if fault == "lock" else "record"
    assert missing.startswith(f"megatron-oreal: did not arrive: rank 1 ({place} of 4 for ")
    assert ("does not answer" in missing) == (fault == "stop")
    assert stacks.startswith(f"megatron-oreal: stacks of {1 if fault == 'stop' else 2} of 2 ranks")
    assert "policy of 4 since" in end.stacks(0)
    assert "waits for: barrier" in end.stacks(0)
    assert "in barrier" in end.stacks(0)
    assert end.console.count("Traceback") == 0
    assert (tmp_path / "report.txt").read_text() == end.console.replace("megatron-oreal: ", "")
    if fault != "stop":
        assert "watchdog_program.py" in end.stacks(1)


def test_what_does_not_stop_in_time_is_left_to_be_resumed(tmp_path: Path) -> None:
    end = run(tmp_path, 2, "abandon")
    assert end.statuses == [75, 75]
    why, _ = lines(end)
    expected = "asked to stop, and still in policy of 4: left, to go on from the last checkpoint"
    assert why == f"megatron-oreal: {expected}"


def test_an_error_is_shown_once_and_ends_all(tmp_path: Path) -> None:
    started_s = time.monotonic()
    end = run(tmp_path, 3, "raise")
    assert time.monotonic() - started_s < END_DEADLINE_S
    assert end.statuses == [1, 1, 1]
    assert end.console.count("Traceback") == 1
    assert end.console.count("RuntimeError: spilled ink") == 2  # the traceback's and the line's
    assert "onnection" not in end.console
    why, _ = lines(end)
    expected = "rank 1 failed in record of 4: RuntimeError: spilled ink; the other 2 end with it"
    assert why == f"megatron-oreal: {expected}"
    assert msgspec.json.decode((tmp_path / "end.json").read_bytes())["rank"] == 1


@pytest.mark.slow  # test_killed_rank.py does it to a training under torchrun
def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    end = run(tmp_path, 3, "kill")
    assert end.statuses == [1, -signal.SIGKILL, 1]
    assert "Traceback" not in end.console
    why, _ = lines(end)
    assert "rank 1 (pid " in why
    assert why.endswith(
        " is gone without a word, in record of 4: killed, perhaps for want of memory"
    )
