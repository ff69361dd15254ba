"""A file of records that can be appended one at a time, each under its own checksum.

After a mark of eight bytes a record is: its length (4 bytes, big-endian), BLAKE2b (16 bytes) of the
checksum before it and of its content, the content. The checksums are a chain: a record that was
changed, left out, doubled or moved shows as one that does not follow.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MARK = b"OREALgr\n"
_LENGTH = struct.Struct(">I")
_DIGEST_BYTES = 16
_HEAD_BYTES = _LENGTH.size + _DIGEST_BYTES


class DamagedRecord(ValueError):  # noqa: N818  a state of a file, which the caller reports
    """A file of records is not what was written; the text says where."""


class Frames:
    """Puts records into the form in which they follow each other in a file."""

    def __init__(self) -> None:
        """Starts a file, at its mark."""
        self._before = MARK

    def frame(self, content: bytes) -> bytes:
        """Returns the bytes that stand for the next record."""
        self._before = _digest(self._before, content)
        return _LENGTH.pack(len(content)) + self._before + content


def framed(contents: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the bytes of a whole file of these records, part by part."""
    frames = Frames()
    yield MARK
    for content in contents:
        yield frames.frame(content)


def read_frames(data: bytes) -> Iterator[bytes]:
    """Yields the records of a file, each only once its checksum is right.

    Raises:
        DamagedRecord: The file begins with another mark, ends inside a record, or a checksum is
            wrong; names the record, counted from 0.
    """
    if not data.startswith(MARK):
        raise DamagedRecord("does not begin like a file of records")
    before, start, number = MARK, len(MARK), 0
    while start < len(data):
        if len(data) - start < _HEAD_BYTES:
            raise DamagedRecord(f"ends inside record {number}")
        (length,) = _LENGTH.unpack_from(data, start)
        content = data[start + _HEAD_BYTES : start + _HEAD_BYTES + length]
        if len(content) < length:
            raise DamagedRecord(f"ends inside record {number}")
        before = _digest(before, content)
        if before != data[start + _LENGTH.size : start + _HEAD_BYTES]:
            raise DamagedRecord(f"record {number} has changed since it was written")
        yield content
        start, number = start + _HEAD_BYTES + length, number + 1


def whole_bytes(data: bytes) -> int:
    """Returns how far a file that was being appended to is whole: to the end of its last record."""
    end = len(MARK) if data.startswith(MARK) else 0
    try:
        for content in read_frames(data):
            end += _HEAD_BYTES + len(content)
    except DamagedRecord:
        return end
    return end


def _digest(before: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(before + content, digest_size=_DIGEST_BYTES).digest()
