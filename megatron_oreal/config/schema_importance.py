"""The section that corrects for what the engine samples from: a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_oreal.config.checks import at_least


@dataclass(frozen=True)
class ImportanceConfig:
    """Truncated importance weights between policy and engine; see `algorithm/importance.py`."""

    level: Literal["none", "token", "sequence"] = "none"
    cap: float = 2.0
    above_cap: Literal["truncate", "mask"] = "truncate"

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "cap")  # below 1 it would cut where engine and policy agree
