"""Metrics: one flat dict of floats per iteration, names like `oreal/loss`, as strict JSON.

JSON has no word for a number that is not finite. It is written as the string "nan", "inf" or
"-inf", not as null, so that an overflow can be told from a value that was never measured.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Kind = Literal["train", "eval"]
MEASURED = ("time/", "throughput/", "memory/")
"""Prefixes of what clocks and gauges say: two runs that are alike differ in these alone."""
NON_FINITE = frozenset({"nan", "inf", "-inf"})


def merge(*parts: Mapping[str, float]) -> dict[str, float]:
    """Returns all parts as one dict of floats; ValueError where two of them share a name."""
    merged: dict[str, float] = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise ValueError(f"metrics given twice: {', '.join(sorted(twice))}")
        merged |= {name: float(value) for name, value in part.items()}
    return merged


def to_json(record: Any, indent: int | None = None) -> str:
    """Returns strict JSON, one line unless indented.

    Numbers that are not finite become strings; lone surrogates, which UTF-8 has no bytes for,
    become question marks.
    """
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", errors="replace").decode("utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`, numbers that are not finite as floats again.

    A resumed run repeats the iterations since its checkpoint: of the lines of one kind and
    iteration only the last is returned, in the order of these last lines. What stands after the
    last line's end is being written, and left for the next time.

    Raises:
        UserError: naming file and line where a line is no object with `kind` and `iteration`.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        record = _parse(line, f"{path}:{number}")
        key = (record["kind"], record["iteration"])
        records.pop(key, None)
        records[key] = record
    return list(records.values())


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON; delete it") from error
    fields = record if isinstance(record, dict) else {}
    if fields.get("kind") not in ("train", "eval") or not isinstance(fields.get("iteration"), int):
        raise UserError(f"{where}: no object with kind and iteration; delete the line")
    return {
        name: float(value) if isinstance(value, str) and value in NON_FINITE else value
        for name, value in fields.items()
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
