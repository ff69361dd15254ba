"""Ends a run whose ranks wait for one that does not come, or have lost one, and says which.

1. Each rank says where it is, see `whereabouts`; a thread of it looks once a second whether it has
   been in one phase for longer than `watchdog.*` allows, whether a neighbour's process is gone, and
   whether any rank has begun to end the run.
2. The rank that finds something first says so on the console, once: `ranks/end.json`, which only
   one can create, makes it the first. All others end with it, whatever their main threads do.
3. Each leaves `ranks/rank_00003.stacks.txt`: where it was, what it waited for, an error that only
   followed from the first, the Python stacks of all its threads. `ranks/report.txt` keeps the words
   of the console.
4. A rank whose C code holds the interpreter's lock cannot run the thread. Its stacks come from
   faulthandler's own timer half a minute after the deadline, which ends the process as well.

A whole job that was suspended for longer than a deadline ends once it is continued.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor import ending, pending, whereabouts
from megatron_oreal.monitor.whereabouts import BETWEEN, ENDED, Whereabouts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from megatron_oreal.config.schema import WatchdogConfig

FAILED_EXIT = 1
STOPPED_EXIT = 75  # sysexits' EX_TEMPFAIL: a signal stopped the run, which will resume
_LOOK_S = 1.0
_ANSWER_S = 10.0  # for the other ranks to leave their stacks
_LOCKED_S = 30.0  # beyond the deadline, then the interpreter's lock must be held
_PREFIX = "megatron-oreal: "

_KEYS = {
    **dict.fromkeys(("checkpoint", "export", "record", "replay"), "save_s"),
    "sleep": "sync_s",
    **{name: f"{name}_s" for name in ("start", "generate", "verify", "sync", "evaluate", BETWEEN)},
}


def key_of(phase: str) -> str:
    """Returns the key of the `watchdog` section that holds a phase's deadline."""
    return _KEYS.get(phase, "train_s")


class Watchdog:
    """Follows this rank through its phases; nothing it does is collective.

    Args:
        folder: `ranks/` of the run, emptied before any rank opens a watchdog.
        rank: of the world.
        ranks: of the world.
        deadlines: the `watchdog` section.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, deadlines: WatchdogConfig) -> None:
        self._folder, self._ranks, self._deadlines = folder, ranks, deadlines
        host, pid, namespace = whereabouts.this_process()
        self._where = Whereabouts(rank, host, pid, namespace, BETWEEN, None, time.time(), 0)
        self._entered = time.monotonic()
        self._abandon_at: float | None = None
        self._failed_at: tuple[BaseException, str] | None = None
        self._told_of_disk = False
        self._telling = threading.Lock()
        self._everyone: list[Whereabouts] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        # Opened ahead: in trouble there may be no more files to be had.
        self._stacks = os.open(self._stacks_of(rank), flags, 0o644)
        self._closed = threading.Event()
        self._move(BETWEEN)
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Is in a phase, under its own deadline; within another one that one's rests meanwhile."""
        outer = self._where.phase
        self._move(name)
        try:
            yield
        except BaseException as error:
            if self._failed_at is None or self._failed_at[0] is not error:
                self._failed_at = (error, self._where.place)
            raise
        finally:
            self._move(outer)

    def begin(self, iteration: int) -> None:
        """Is in another iteration."""
        self._where = msgspec.structs.replace(self._where, iteration=iteration)
        self._move(self._where.phase)

    def abandon_at(self, moment: float) -> None:
        """Leaves the run at a moment of the monotonic clock, with what its last checkpoint has.

        Unless a checkpoint is being written. All ranks end with `STOPPED_EXIT`.
        """
        self._abandon_at = moment

    @contextlib.contextmanager
    def first_error_only(self) -> Iterator[None]:
        """Ends the process where the block fails, at once, in a world of several ranks.

        The first rank's error is shown, those that follow from it are not. What would be taken down
        in order is not: much of it waits for ranks that have failed. A `UserError`, which all ranks
        raise alike, goes its way.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self._ranks > 1:
                self._fail(error)
            raise

    def close(self) -> None:
        """Is not watched from here on."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        self._move(ENDED)
        os.close(self._stacks)

    def _move(self, phase: str) -> None:
        """Says where this rank is and sets the deadline anew."""
        before = self._where
        self._where = msgspec.structs.replace(
            before,
            phase=phase,
            since=time.time(),
            step=before.step + 1,
            collectives=pending.collectives_begun(),
            pending="",
        )
        self._entered = time.monotonic()
        self._write()
        seconds = 0.0 if phase == ENDED else self._deadline_s(phase)
        if seconds:
            late = seconds + _LOCKED_S
            faulthandler.dump_traceback_later(late, exit=True, file=self._stacks)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _deadline_s(self, phase: str) -> float:
        return float(getattr(self._deadlines, key_of(phase)))

    def _write(self) -> None:
        """Writes where this rank is; a disk that refuses costs the file alone, and a line."""
        try:
            whereabouts.write(self._folder, self._where)
        except OSError as error:
            if not self._told_of_disk:
                _say(f"{self._folder} cannot be written: {error}; other ranks cannot be told why")
            self._told_of_disk = True

    def _look(self) -> None:
        """The thread."""
        while not self._closed.wait(_LOOK_S):
            where, spent = self._where, time.monotonic() - self._entered
            deadline = self._deadline_s(where.phase)
            if self._end.exists():
                self._follow("")
            elif deadline and spent > deadline and where.step == self._where.step:
                key = key_of(where.phase)
                why = f"rank {where.rank} has been in {where.place} for {spent:.0f} s"
                self._end_run([f"{why}, longer than watchdog.{key}={deadline:g}"], late=True)
            elif lost := self._lost():
                self._end_run(lost)
            elif self._is_abandoned(where.phase):
                why = f"asked to stop, and still in {where.place}: left, to go on from the last"
                self._end_run([f"{why} checkpoint"], status=STOPPED_EXIT)

    def _is_abandoned(self, phase: str) -> bool:
        moment = self._abandon_at
        return moment is not None and time.monotonic() > moment and phase != "checkpoint"

    def _lost(self) -> list[str]:
        """Names the neighbours that are gone."""
        if len(self._everyone) < self._ranks:
            self._everyone = whereabouts.read_all(self._folder, self._ranks)
        mine = self._where
        if not whereabouts.gone(self._everyone, mine.host, mine.namespace):
            return []
        self._everyone = whereabouts.read_all(self._folder, self._ranks)  # one may have ended well
        return [
            f"rank {where.rank} (pid {where.pid} on {where.host}) is gone without a word, in"
            f" {where.place}: killed, perhaps for want of memory"
            for where in whereabouts.gone(self._everyone, mine.host, mine.namespace)
        ]

    def _fail(self, error: Exception) -> NoReturn:
        """Ends the run for an error of the main thread, or with it where another was first."""
        place = self._where.place
        if self._failed_at and self._failed_at[0] is error:
            place = self._failed_at[1]
        text = "".join(traceback.format_exception(error))
        if lost := self._lost():
            self._end_run(lost, text)
        name = f"{type(error).__name__}: {' '.join(str(error).split())}"
        why = f"rank {self._where.rank} failed in {place}: {name}"
        self._end_run([f"{why}; the other {self._ranks - 1} end with it"], text, show=True)

    def _end_run(
        self,
        lines: list[str],
        error: str = "",
        *,
        late: bool = False,
        show: bool = False,
        status: int = FAILED_EXIT,
    ) -> NoReturn:
        """Ends the run for this reason, or with it where another rank was first."""
        if not self._claim(lines, status):
            self._follow(error)
        if show:
            os.write(2, error.encode(errors="replace"))
        self._leave_stacks("" if show else error)
        answered = self._wait_for_answers()
        if late:
            everyone = whereabouts.read_all(self._folder, self._ranks)
            names = ending.late(everyone, self._ranks, answered, time.time())
            none = "all ranks are in the same place, waiting alike: see their stacks"
            lines.append(f"did not arrive: {ending.listed(names)}" if names else none)
        lines.append(f"stacks of {len(answered)} of {self._ranks} ranks are in {self._folder}")
        _say(*lines)
        with contextlib.suppress(OSError):
            self._report.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os._exit(status)

    def _follow(self, error: str) -> NoReturn:
        """Ends with another rank, once that has said why."""
        self._leave_stacks(error)
        deadline = time.monotonic() + 2 * _ANSWER_S
        while not self._report.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            status = msgspec.json.decode(self._end.read_bytes())["status"]
        except (OSError, msgspec.DecodeError):
            status = FAILED_EXIT
        os._exit(status)

    def _claim(self, lines: list[str], status: int) -> bool:
        """Whether this rank is the first to end the run; where nobody can tell, it is."""
        try:
            with self._end.open("xb") as file:
                end = {"rank": self._where.rank, "why": lines, "status": status}
                file.write(msgspec.json.encode(end))
        except FileExistsError:
            return False
        except OSError as error:
            lines.append(f"{self._end} cannot be written: {error}")
        return True

    def _leave_stacks(self, error: str) -> None:
        """Writes what this rank does, once; never where the other thread of it has begun to."""
        if not self._telling.acquire(blocking=False):
            return
        faulthandler.cancel_dump_traceback_later()  # this thread runs, and will end the process
        self._where = msgspec.structs.replace(
            self._where, collectives=pending.collectives_begun(), pending=pending.pending()
        )
        self._write()
        with contextlib.suppress(OSError):
            os.write(self._stacks, ending.header(self._where).encode())
            os.write(self._stacks, error.encode(errors="replace"))
            faulthandler.dump_traceback(self._stacks)

    def _wait_for_answers(self) -> set[int]:
        """Waits for the stacks of ranks that are alive; returns which came."""
        deadline = time.monotonic() + _ANSWER_S
        answered: set[int] = set()
        while True:
            for rank in set(range(self._ranks)) - answered:
                with contextlib.suppress(OSError):
                    if self._stacks_of(rank).stat().st_size:
                        answered.add(rank)
            mine = self._where
            lost = whereabouts.gone(self._everyone, mine.host, mine.namespace)
            rest = set(range(self._ranks)) - answered - {where.rank for where in lost}
            if not rest or time.monotonic() > deadline:
                return answered
            time.sleep(0.1)

    def _stacks_of(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.stacks.txt"

    @property
    def _end(self) -> Path:
        return self._folder / "end.json"

    @property
    def _report(self) -> Path:
        return self._folder / "report.txt"


def _say(*lines: str) -> None:
    """Writes to the console past every buffer, which another thread may hold."""
    os.write(2, "".join(f"{_PREFIX}{line}\n" for line in lines).encode(errors="replace"))
