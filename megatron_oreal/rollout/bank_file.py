"""A file to which records are appended one at a time, and what is whole of it after a crash.

Each record is a file of `frames` by itself, with the mark at its start: what is damaged or torn
costs the record in which it lies and no other.
"""

from __future__ import annotations

import os
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from megatron_oreal.rollout.frames import MARK, DamagedRecord, framed, read_frames

if TYPE_CHECKING:
    from pathlib import Path


class BankFile:
    """Appends records in a thread of its own: nobody waits for the disk.

    All records that came while the disk was busy are forced to it at once. A disk that refuses
    costs the records alone.

    Attributes:
        problem: why nothing more is written, empty where all is well.
    """

    def __init__(self, path: Path) -> None:
        """Takes where the file lies or will lie; without a record nothing is made."""
        self.problem = ""
        self._path = path
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="bank", daemon=True)
        self._thread.start()

    def append(self, content: bytes) -> None:
        """Hands over a record and returns at once; from any thread, until the file is closed."""
        self._waiting.put(content)

    def close(self) -> None:
        """Waits until all that was handed over is on the disk."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            contents = self._take()
            ended = contents[-1] is None
            records = [b"".join(framed([content])) for content in contents if content is not None]
            if records and not self.problem:
                self._write(b"".join(records))

    def _take(self) -> list[bytes | None]:
        """Waits for a record and takes what else is there."""
        taken = [self._waiting.get()]
        while taken[-1] is not None:
            try:
                taken.append(self._waiting.get_nowait())
            except Empty:
                break
        return taken

    def _write(self, records: bytes) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.problem = f"{self._path}: {error}"


def read_bank_file(data: bytes) -> tuple[list[bytes], list[str]]:
    """Returns the whole records of such a file, and what is wrong with each of the others."""
    stray, *parts = data.split(MARK)
    contents = []
    problems = ["does not begin with a record"] if stray else []
    for number, part in enumerate(parts):
        try:
            # One by one: where the next mark has changed, the record before it is whole.
            contents.extend(read_frames(MARK + part, number))
        except DamagedRecord as damage:
            problems.append(str(damage))
    return contents, problems
