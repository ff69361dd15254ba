"""The judged groups of an iteration on the disk, exactly as they were trained on.

One file an iteration, `frames` of msgpack: a header, then one record a group, in the order of the
iteration. What a model wrote is read into declared types and never evaluated. Rewards and
advantages are not written: they follow from the verdicts under the `oreal` section of whoever
trains on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from megatron_oreal.monitor.run_folder import atomic_write
from megatron_oreal.rollout.frames import DamagedRecord, framed, read_frames
from megatron_oreal.types import RolloutGroup

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FORMAT = 1


class RecordHeader(msgspec.Struct, frozen=True):
    """What was asked for; without the same the groups are not those of a run.

    Attributes:
        format: of the file.
        iteration: 0-based.
        seed: of the run.
        questions: number of groups.
        samples: responses of each group.
        vocabulary: digest of the tokenizer's.
        sampled_by: digest of what else decided which groups came, empty where nobody asks.
        temperature: of the samples; 0 where an older record does not say.
        top_p: likewise.
    """

    format: int
    iteration: int
    seed: int
    questions: int
    samples: int
    vocabulary: str
    sampled_by: str = ""
    temperature: float = 0.0
    top_p: float = 0.0


def record_path(folder: Path, iteration: int) -> Path:
    """Returns where the groups of an iteration lie in a folder of records."""
    return folder / f"iteration_{iteration:06d}.groups"


def write_groups(folder: Path, header: RecordHeader, groups: Sequence[RolloutGroup]) -> Path:
    """Writes the record of an iteration, whole or not at all; on one rank only, not collective.

    Raises:
        OSError: The file system refuses.
    """
    path = record_path(folder, header.iteration)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, framed(map(msgspec.msgpack.encode, (header, *groups))))
    return path


def read_header(path: Path) -> RecordHeader:
    """Reads what a record is of; not collective.

    Raises:
        DamagedRecord: The file does not begin with a header of this format.
        OSError: The file cannot be read.
    """
    # Far longer than any header; that the next record is cut off here does not matter.
    with path.open("rb") as file:
        return _header(next(read_frames(file.read(1 << 16)), b""))


def decode_groups(data: bytes) -> tuple[RecordHeader, list[RolloutGroup]]:
    """Reads the content of a whole file; not collective.

    Raises:
        DamagedRecord: It is not what was written; names the record.
    """
    first, *rest = [*read_frames(data)] or [b""]
    header = _header(first)
    groups = [_group(content, number, header) for number, content in enumerate(rest, start=1)]
    if len(groups) != header.questions:
        raise DamagedRecord(f"holds {len(groups)} groups of {header.questions}")
    return header, groups


def _header(content: bytes) -> RecordHeader:
    try:
        header = msgspec.msgpack.decode(content, type=RecordHeader)
    except msgspec.DecodeError as error:
        raise DamagedRecord(f"has no header ({error})") from error
    if header.format != FORMAT:
        raise DamagedRecord(f"has format {header.format}, this version reads {FORMAT}")
    return header


def _group(content: bytes, number: int, header: RecordHeader) -> RolloutGroup:
    try:
        group = msgspec.msgpack.decode(content, type=RolloutGroup)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedRecord(f"record {number} is no group ({error})") from error
    if not len(group.rollouts) == len(group.verdicts) == header.samples:
        raise DamagedRecord(f"record {number} has not {header.samples} judged samples")
    if any(len(rollout.tokens) != len(rollout.logprobs) for rollout in group.rollouts):
        raise DamagedRecord(f"record {number} has not one log-probability a token")
    return group
