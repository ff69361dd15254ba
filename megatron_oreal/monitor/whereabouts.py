"""Where each rank of a run is: one small file a rank in `run.folder/ranks`, for peers and people.

`rank_00003.json` is one JSON object, `Whereabouts`. It is replaced whole at every change of phase,
by one rename and without a sync: it speaks of a process, and dies with the machine. The folder is
the run's own, which all ranks see: a peer on another node has to know who is behind. That is two
operations on metadata a phase and rank, of which an iteration has about ten.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

BETWEEN, ENDED = "between", "ended"


class Whereabouts(msgspec.Struct, frozen=True):
    """Where a rank is.

    Attributes:
        rank: of the world.
        host: the machine it runs on.
        pid: of its process, as this machine counts them in `namespace`.
        namespace: the process-id namespace; a pid means something in the same one only.
        phase: the innermost phase of the journal it is in, `between` outside of all, `ended` once
            the rank has ended as it should.
        iteration: the one under way, the last one after it; null before the first.
        since: when it came there, seconds since 1970.
        step: changes of phase so far; all ranks go the same way, so that less is behind.
        collectives: exchanges between ranks that the trainer has begun so far, likewise; kept up to
            date in a report, else as of the last change of phase.
        pending: what the rank waits for, empty where nothing is known of; likewise.
    """

    rank: int
    host: str
    pid: int
    namespace: str
    phase: str
    iteration: int | None
    since: float
    step: int
    collectives: int = 0
    pending: str = ""

    @property
    def place(self) -> str:
        """Phase and iteration in a few words."""
        return self.phase if self.iteration is None else f"{self.phase} of {self.iteration}"


def this_process() -> tuple[str, int, str]:
    """Returns machine, pid and process-id namespace of this process."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115  a name, no file
    except OSError:  # no Linux
        namespace = ""
    return socket.gethostname(), os.getpid(), namespace


def path_of(folder: Path, rank: int) -> Path:
    """Returns the file of a rank."""
    return folder / f"rank_{rank:05d}.json"


def write(folder: Path, where: Whereabouts) -> None:
    """Replaces the file of a rank.

    Raises:
        OSError: The file system refuses.
    """
    path = path_of(folder, where.rank)
    temporary = path.with_name(f".{path.name}.{where.pid}.tmp")
    temporary.write_bytes(msgspec.json.encode(where))
    temporary.replace(path)


def read_all(folder: Path, ranks: int) -> list[Whereabouts]:
    """Returns what is known of these many ranks, by rank; one without a readable file is absent."""
    found = []
    for rank in range(ranks):
        try:
            found.append(msgspec.json.decode(path_of(folder, rank).read_bytes(), type=Whereabouts))
        except (OSError, msgspec.DecodeError):
            continue
    return found


def gone(everyone: Iterable[Whereabouts], host: str, namespace: str) -> list[Whereabouts]:
    """Returns those of this machine and namespace whose process has ended without saying so."""
    return [
        where
        for where in everyone
        if (where.host, where.namespace) == (host, namespace)
        and where.phase != ENDED
        and not _is_alive(where.pid)
    ]


def _is_alive(pid: int) -> bool:
    """Whether there is such a process; one that only waits for its parent to notice is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  no more than a read
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:  # ended since, or no Linux
        return True
