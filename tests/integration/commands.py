"""Starts the command line as a user does, alone or under torchrun, and never leaves it behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ("-m", "megatron_oreal.cli")
TIMEOUT_S = 240.0  # everything here takes seconds on two quiet cores
_OF_A_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it wrote."""

    status: int
    stdout: str
    stderr: str

    def lines(self) -> list[str]:
        """What the command line said on stderr in its own name."""
        return [line for line in self.stderr.splitlines() if line.startswith("megatron-oreal: ")]


def alone(*arguments: object, variables: Mapping[str, str] | None = None) -> Finished:
    """`megatron-oreal arguments...` in a single process."""
    return run([sys.executable, *COMMAND, *map(str, arguments)], variables)


def under_torchrun(ranks: int, *arguments: object, program: Sequence[str] = COMMAND) -> Finished:
    """The same on so many ranks."""
    return run(torchrun(ranks, *arguments, program=program))


def torchrun(ranks: int, *arguments: object, program: Sequence[str] = COMMAND) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), *program),
        *map(str, arguments),
    ]


def run(
    command: Sequence[str],
    variables: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Finished:
    with started(command, variables) as process:
        stdout, stderr = process.communicate(timeout=timeout_s)
    return Finished(process.returncode, stdout, stderr)


@contextlib.contextmanager
def started(
    command: Sequence[str], variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until the block ends, at the latest; with everything it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment() | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group has ended, as it should
            os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OF_A_WORLD}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
