"""Reads rows into declared records; every error names config key, file, line and field.

Rows are lines of JSON, or rows of Parquet and Arrow files; `sources` says what may be named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.sources import COLUMNAR, find_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Record = TypeVar("Record", bound=msgspec.Struct)


class Row(NamedTuple, Generic[Record]):
    """A record and where it stands.

    Attributes:
        where: Ready to begin an error message.
        name: `line-7` or `row-7`, counted from 1 over all files of the source.
        record: What the row holds.
    """

    where: str
    name: str
    record: Record


class _Raw(NamedTuple):
    number: int
    values: Mapping[str, Any]
    columns: Sequence[str]


def read_records(
    source: str | Path,
    key: str,
    record: type[Record],
    columns: Mapping[str, str] | None = None,
) -> Iterator[Row[Record]]:
    """Yields row by row, never a whole file; blank lines are passed over.

    Args:
        source: As `sources.find_files` takes it.
        key: The config key that names it, for errors; `data.path` has its columns in
            `data.columns`.
        record: The msgspec struct each row must match; columns it does not ask for are ignored,
            and null leaves a field that has a default at that.
        columns: The column of each field, where it has another name; a dot leads into a nested
            one. None where the source must use the names of the fields.

    Raises:
        UserError: A file cannot be read, there is no row, or a row is not of that shape.
    """
    before = 0
    empty = True
    for path in find_files(source, key):
        columnar = path.suffix in COLUMNAR
        unit, rows = ("row", _rows) if columnar else ("line", _lines)
        number = 0
        for raw in rows(path, key, record, columns or {}):
            number = raw.number
            where = f"{key}={path}, {unit} {number}"
            values = _pick(raw, record, columns, where, key)
            yield Row(where, f"{unit}-{before + number}", _convert(values, record, where))
            empty = False
        before += number
    if empty:
        raise UserError(f"{key}={source}: the file is empty: give it one JSON object a line")


def require_text(value: str, field: str, where: str) -> str:
    """Returns `value` unless it is blank.

    Raises:
        UserError: It is.
    """
    if not value.strip():
        raise UserError(f"{where}: field `{field}` is blank: fill it in or remove the line")
    return value


def _lines(
    path: Path, key: str, record: type[msgspec.Struct], _columns: Mapping[str, str]
) -> Iterator[_Raw]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                try:
                    values = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise _malformed(error, record, f"{key}={path}, line {number}") from error
                yield _Raw(number, values, list(values))
    except OSError as error:
        raise _unreadable(error, path, key) from error


def _rows(
    path: Path, key: str, record: type[msgspec.Struct], columns: Mapping[str, str]
) -> Iterator[_Raw]:
    # Imported here: who reads lines of JSON does not wait for pyarrow.
    from megatron_oreal.data.columnar import NotColumnarError, open_columnar

    names = [columns.get(name, name) for name in record.__struct_fields__]
    wanted = {*names, *(name.partition(".")[0] for name in names)}
    try:
        with open_columnar(path) as file:
            for number, values in enumerate(file.rows(wanted), start=1):
                yield _Raw(number, values, file.columns)
    except NotColumnarError as error:
        kind = path.suffix.removeprefix(".")
        raise UserError(f"{key}={path}: not a whole {kind} file ({error}): name one") from error
    except OSError as error:
        raise _unreadable(error, path, key) from error


def _pick(
    raw: _Raw,
    record: type[msgspec.Struct],
    columns: Mapping[str, str] | None,
    where: str,
    key: str,
) -> dict[str, Any]:
    """Returns the values of a record's fields, those that are there."""
    picked: dict[str, Any] = {}
    for field in msgspec.structs.fields(record):
        column = (columns or {}).get(field.name, field.name)
        try:
            value = _look_up(raw.values, column)
        except KeyError as error:
            if not field.required and column == field.name:
                continue
            has = ", ".join(f"`{name:.40}`" for name in raw.columns) or "nothing"
            setting = f"{key.rpartition('.')[0]}.columns.{field.name}"
            fix = f"set {setting}" if columns is not None else "rename one"
            raise UserError(
                f"{where}: no required field `{column}`; it has {has}: {fix}"
            ) from error
        if value is not None or field.required:
            picked[field.name] = value
    return picked


def _look_up(values: Mapping[str, Any], column: str) -> Any:
    if column in values:
        return values[column]
    name, dot, rest = column.partition(".")
    inner = values.get(name)
    if not dot or not isinstance(inner, dict):
        raise KeyError(column)
    return _look_up(inner, rest)


def _convert(values: dict[str, Any], record: type[Record], where: str) -> Record:
    try:
        return msgspec.convert(values, record)
    except msgspec.ValidationError as error:
        raise _malformed(error, record, where) from error


def _malformed(error: Exception, record: type[msgspec.Struct], where: str) -> UserError:
    fields = msgspec.structs.fields(record)
    needed = ", ".join(f"`{field.name}`" for field in fields if field.required)
    fix = f"each line is a JSON object with {needed}"
    return UserError(f"{where}: {' '.join(str(error).split())}: {fix}")


def _unreadable(error: OSError, path: Path, key: str) -> UserError:
    fix = "name a readable JSONL file, or Parquet, or a folder of these"
    return UserError(f"{key}={path}: {error.strerror or error}: {fix}")
