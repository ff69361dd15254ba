"""The sections that say when a run is ill: a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_oreal.config.checks import at_least, share

AlarmAction = Literal["alarm", "skip", "stop"]


@dataclass(frozen=True)
class AlarmsConfig:
    """Bounds of what a healthy run shows, 0 for none, and what happens beyond them."""

    min_pass_rate: float = 0.01
    min_entropy: float = 0.01
    max_mismatch: float = 0.1
    min_engine_share: float = 0.5
    max_memory_share: float = 1.1
    iterations: int = 3
    on_pass_rate: AlarmAction = "alarm"
    on_entropy: AlarmAction = "alarm"
    on_mismatch: AlarmAction = "alarm"
    on_engine_logprobs: AlarmAction = "skip"
    on_memory: Literal["alarm", "stop"] = "alarm"

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        share(self, "min_pass_rate")
        share(self, "min_engine_share")
        at_least(self, 0, "min_entropy", "max_mismatch", "max_memory_share")
        at_least(self, 1, "iterations")


@dataclass(frozen=True)
class WatchdogConfig:
    """How long a rank may stay in a phase, in seconds; 0 for as long as it takes."""

    start_s: float = 3600.0
    generate_s: float = 7200.0
    verify_s: float = 3600.0
    train_s: float = 3600.0
    sync_s: float = 1800.0
    save_s: float = 3600.0
    evaluate_s: float = 14400.0
    between_s: float = 1800.0

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 0, *(field.name for field in fields(self)))

    @property
    def timeout_s(self) -> float:
        """Of an exchange between ranks: later than every deadline, a month where one is missing."""
        deadlines = [getattr(self, field.name) for field in fields(self)]
        return max(deadlines) + 600 if all(deadlines) else 30 * 86400.0
