"""A Slurm of three nodes on this one machine, with keys, ports and folders of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.integration.commands import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
DEADLINE_S = 60.0
POLL_S = 0.2
CONFIG = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits for its credential to expire.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
# Heterogeneous jobs are started by the backfill scheduler alone.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=1,bf_resolution=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SwitchType=switch/none
KillWait=30
PartitionName=toy Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN\n"
NODES = ("node0", "node1", "node2")


def why_not() -> str:
    """Why no Slurm can be started here; empty where one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


@dataclass(frozen=True)
class Slurm:
    """A running cluster."""

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str, more: Mapping[str, str] | None = None) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.variables | dict(more or {}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, key by key."""
        words = self.ask("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """What the daemons wrote, for a failing test."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Starts the daemons, waits until all nodes are idle, and ends what it started."""
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    folder.chmod(0o755)  # munge refuses a socket that its clients cannot reach
    host = socket.gethostname().split(".")[0]
    controller, *ports = _free_ports(1 + len(NODES))
    config = CONFIG.format(folder=folder, host=host, controller=controller)
    for name, port in zip(NODES, ports, strict=True):
        config += NODE.format(name=name, host=host, port=port)
    (folder / "slurm.conf").write_text(config)
    slurm = Slurm(folder)
    munged = ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket")
    munged += (f"--key-file={key}", f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/seed")
    commands = [
        (*munged, f"--log-file={folder}/munge.log"),
        ("slurmctld", "-D", "-i", "-L", f"{folder}/controller.log"),
        *(("slurmd", "-D", "-N", node, "-L", f"{folder}/{node}.log") for node in NODES),
    ]
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.enter_context(_daemon(command, slurm))
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), slurm)
        _wait(lambda: _idle(slurm), slurm)
        try:
            yield slurm
        finally:  # a job that a failed test leaves would outlive the daemons
            if jobs := slurm.ask("squeue", "--noheader", "--format=%A").split():
                slurm.ask("scancel", *jobs)
                _wait(lambda: _idle(slurm), slurm)


@contextlib.contextmanager
def _daemon(command: tuple[str, ...], slurm: Slurm) -> Iterator[None]:
    with (slurm.folder / f"{command[0]}.output").open("a") as output:
        process = subprocess.Popen(
            command, env=slurm.variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _idle(slurm: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"],
        env=slurm.variables,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.stdout.strip() == f"idle {len(NODES)}"


def _wait(ready, slurm: Slurm) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(POLL_S)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
