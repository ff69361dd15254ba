"""Where a run goes on: what it remembers besides tensors, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import msgspec

from megatron_oreal.checkpoint.checkpointer import Checkpointer, Resumed
from megatron_oreal.checkpoint.run_state import Command
from megatron_oreal.config.schema import Config
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.monitor.watchdog import Watchdog
from megatron_oreal.parallel.collectives import all_gather_bytes
from megatron_oreal.trainer.evaluation import EvaluationResult

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_ASKED = b"megatron-oreal: asked to stop: after this iteration; a second signal ends at once\n"

ProgressT = TypeVar("ProgressT", bound=msgspec.Struct)


class LoopProgress(msgspec.Struct, frozen=True):
    """What `train` remembers; `before` is the evaluation before the first iteration."""

    prompts: dict[str, Any]
    policy_updates: int = 0
    token_rm_updates: int = 0
    engine_checked: bool = False
    skipped_in_a_row: int = 0
    alarms_in_a_row: dict[str, int] = {}
    before: EvaluationResult | None = None


class SftProgress(msgspec.Struct, frozen=True):
    """What `sft` remembers: which demonstrations it has read."""

    fingerprint: str


def find_checkpoint(config: Config, command: Command) -> tuple[Checkpointer, Resumed | None]:
    """Returns what writes a run's checkpoints, and the one to go on from; collective, the world.

    Raises:
        UserError: See `Checkpointer.find`.
    """
    checkpointer = Checkpointer(config, command, RunFolder.of(config).checkpoints)
    return checkpointer, checkpointer.find()


def read_progress(resumed: Resumed | None, kind: type[ProgressT]) -> ProgressT | None:
    """Returns what the command remembered, None in a run that has just begun; not collective."""
    return msgspec.json.decode(resumed.state.progress, type=kind) if resumed else None


@dataclass
class StopRequest:
    """Whether a signal has asked this rank to stop.

    Attributes:
        within_s: seconds from then on after which a run leaves what it is at; 0 for never.
        received_at: when, by the monotonic clock; None before.
        watchdog: of the run, once it has one.
    """

    within_s: float
    received_at: float | None = None
    watchdog: Watchdog | None = None

    def watched(self, watchdog: Watchdog) -> None:
        """Has the run left by its watchdog if it does not come to a stop in time."""
        self.watchdog = watchdog
        self._abandon_in_time()

    def receive(self) -> None:
        """Takes a signal."""
        self.received_at = time.monotonic()
        self._abandon_in_time()

    def _abandon_in_time(self) -> None:
        if self.watchdog and self.received_at is not None and self.within_s:
            self.watchdog.abandon_at(self.received_at + self.within_s)

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop; collective over the world."""
        return any(all_gather_bytes(b"" if self.received_at is None else b"stop"))


@contextlib.contextmanager
def stop_on_signal(within_s: float = 0.0) -> Iterator[StopRequest]:
    """Takes the first SIGTERM or SIGUSR1 as a request to stop after the iteration.

    A second one ends the process at once, as it would without this. `within_s`: see `StopRequest`.
    """
    request = StopRequest(within_s)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def take(_number: int, _frame: FrameType | None) -> None:
        request.receive()
        if os.environ.get("RANK", "0") == "0":
            os.write(2, _ASKED)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        signal.signal(number, take)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
