"""What the doctor found: a table for people, JSON for programs, an exit status for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec
from rich.table import Table


class Level(StrEnum):
    """How much a finding matters."""

    FINE = "fine"
    NOTE = "note"  # costs speed or memory, or is worth a look
    MISSING = "missing"  # a run needs it


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at, what was found, and what follows from it (empty where nothing does)."""

    area: str
    name: str
    level: Level
    found: str
    says: str = ""
    where: str = ""  # host, or ranks; empty: everywhere


STYLES = {Level.FINE: "green", Level.NOTE: "yellow", Level.MISSING: "bold red"}


def exit_status(findings: Sequence[Finding]) -> int:
    """Returns 0, or 1 where something that a run needs is missing."""
    return int(any(finding.level is Level.MISSING for finding in findings))


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the exit status and all findings as plain data."""
    return {"status": exit_status(findings), "findings": msgspec.to_builtins(list(findings))}


def as_table(findings: Sequence[Finding]) -> Table:
    """Returns the findings as a table, area by area, in the order they were made."""
    table = Table(show_lines=False)
    for column in ("what", "", "found", "what follows"):
        table.add_column(column, overflow="fold")
    area = ""
    for finding in findings:
        if finding.area != area:
            table.add_section()
            area = finding.area
            table.add_row(f"[bold]{area}[/]")
        says = f"{finding.where}: {finding.says}" if finding.where else finding.says
        style = STYLES[finding.level]
        table.add_row(finding.name, f"[{style}]{finding.level}[/]", finding.found, says)
    return table
