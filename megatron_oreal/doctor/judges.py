"""Whether the judge's servers, where a config names any, can be asked from here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_oreal.config.errors import UserError
from megatron_oreal.doctor.report import Finding, Level
from megatron_oreal.verify.judge_check import WAY_OUT, survey_judges

if TYPE_CHECKING:
    from megatron_oreal.config.schema import JudgeConfig

_AREA = "judge"


def check_judges(config: JudgeConfig) -> list[Finding]:
    """Asks each server for its models; not collective.

    A run starts with one that answers: the others are noted.
    """
    try:
        found = survey_judges(config)
    except UserError as error:
        key = str(config.api_key_variable)
        return [Finding(_AREA, "key", Level.MISSING, f"{key} is not set", str(error))]
    level = Level.NOTE if not all(found.values()) else Level.MISSING
    return [
        Finding(_AREA, url, level, problem, WAY_OUT)
        if problem
        else Finding(_AREA, url, Level.FINE, f"serves {config.model}")
        for url, problem in found.items()
    ]
