"""Reads JSON lines into declared records; every error names config key, file, line and field."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

Record = TypeVar("Record", bound=msgspec.Struct)


def read_records(path: str | Path, key: str, record: type[Record]) -> Iterator[tuple[str, Record]]:
    """Yields `(where, record)` line by line, never the whole file; blank lines are passed over.

    Args:
        path: The JSONL file.
        key: The config key that names it, for errors.
        record: The msgspec struct each line must match; fields it does not declare are ignored.

    Yields:
        Where the record stands, ready to begin an error message, and the record.

    Raises:
        UserError: The file cannot be read, holds no record, or a line is not JSON of that shape.
    """
    decoder = msgspec.json.Decoder(record)
    empty = True
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                where = f"{key}={path}, line {number}"
                yield where, _decode(decoder, line, where)
                empty = False
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}: name a readable JSONL file") from error
    if empty:
        raise UserError(f"{key}={path}: the file is empty: give it one JSON object a line")


def require_text(value: str, field: str, where: str) -> str:
    """Returns `value` unless it is blank.

    Raises:
        UserError: It is.
    """
    if not value.strip():
        raise UserError(f"{where}: field `{field}` is blank: fill it in or remove the line")
    return value


def _decode(decoder: msgspec.json.Decoder[Record], line: bytes, where: str) -> Record:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        needed = ", ".join(f"`{name}`" for name in _required(decoder.type))
        fix = f"each line is a JSON object with {needed}"
        raise UserError(f"{where}: {' '.join(str(error).split())}: {fix}") from error


def _required(record: type[msgspec.Struct]) -> list[str]:
    return [field.name for field in msgspec.structs.fields(record) if field.required]
