"""Records that follow each other in a file, each under a checksum.

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


def framed(contents: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the bytes of a whole file of these records, part by part."""
    before = MARK
    yield MARK
    for content in contents:
        before = _digest(before, content)
        yield _LENGTH.pack(len(content)) + before + content


def read_frames(data: bytes, first: int = 0) -> Iterator[bytes]:
    """Yields the records of a file, each only once its checksum is right.

    Raises:
        DamagedRecord: The file begins with another mark, ends inside a record, or a checksum is
            wrong; names the record, counted from `first`.
    """
    if not data.startswith(MARK):
        raise DamagedRecord("does not begin like a file of records")
    before, start, number = MARK, len(MARK), first
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


def _digest(before: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(before + content, digest_size=_DIGEST_BYTES).digest()
