"""Records of judged groups: what goes in comes out, and nothing else is ever taken for one."""

from __future__ import annotations

import pickle
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.rollout.frames import MARK, DamagedRecord, framed, read_frames
from megatron_oreal.rollout.record import (
    FORMAT,
    RecordHeader,
    decode_groups,
    read_header,
    record_path,
    write_groups,
)
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Verdict

HEADER = RecordHeader(FORMAT, iteration=3, seed=7, questions=2, samples=2, vocabulary="v")


def make_group(name: str, text: str = "\\boxed{1}") -> RolloutGroup:
    rollouts = (
        Rollout((5, 6, 1), (-0.1, -1e-300, -float("inf")), text, stopped=True),
        Rollout((7,), (-0.30000000000000004,), "", stopped=False),
    )
    verdicts = (
        Verdict(Outcome.CORRECT, "rule", "equal", "1", 0.01),
        Verdict(Outcome.UNVERIFIED, "judge", "no reply", None, 2.0),
    )
    return RolloutGroup(Prompt(name, "1+0", "1", (2, 3), "sums", 0.5), rollouts, verdicts)


GROUPS = [make_group("a"), make_group("b", "__import__('os').system('x') \x00\U0001f600")]


def content(groups: list[RolloutGroup] = GROUPS, header: RecordHeader = HEADER) -> list[bytes]:
    return [msgspec.msgpack.encode(part) for part in (header, *groups)]


def whole(parts: list[bytes]) -> bytes:
    return b"".join(framed(parts))


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    path = write_groups(folder, HEADER, GROUPS)
    assert path == record_path(folder, 3)
    assert list(folder.iterdir()) == [path]
    assert decode_groups(path.read_bytes()) == (HEADER, GROUPS)
    assert read_header(path) == HEADER


@given(st.data())
def test_one_changed_byte_is_found_wherever_it_is(data: st.DataObject) -> None:
    damaged = bytearray(whole(content()))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedRecord):
        decode_groups(bytes(damaged))


FIRST, SECOND, THIRD = content()
SPLIT = [len(whole(content()[:n])) for n in range(4)]
SHORT = msgspec.structs.replace(HEADER, questions=1)


def swapped() -> bytes:
    data = whole(content())
    return data[: SPLIT[1]] + data[SPLIT[2] : SPLIT[3]] + data[SPLIT[1] : SPLIT[2]]


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, ("must not exist",)


UNEVEN = msgspec.msgpack.encode(GROUPS[0]).replace(b"\x93\x05\x06\x01", b"\x92\x05\x06", 1)

# (what is wrong, the file, what the error names)
DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file of records"),
    "text": (b"hello world, hello world, hello world", "file of records"),
    "a pickle": (pickle.dumps(Malicious()), "file of records"),
    "a pickle in a record": (whole([pickle.dumps(Malicious())]), "no header"),
    "mark alone": (MARK, "no header"),
    "cut in the header": (whole(content())[:30], "ends inside record 0"),
    "cut in a group": (whole(content())[:-5], "ends inside record 2"),
    "cut between groups": (whole(content()[:2]), "holds 1 groups of 2"),
    "one group too many": (whole([*content(), THIRD]), "holds 3 groups of 2"),
    "groups swapped": (swapped(), "record 1 has changed"),
    "a group left out": (
        whole(content())[: SPLIT[1]] + whole(content())[SPLIT[2] :],
        "record 1 has changed",
    ),
    "a length of 4 GiB": (MARK + b"\xff" * 24, "ends inside record 0"),
    "another format": (
        whole([msgspec.msgpack.encode(msgspec.structs.replace(HEADER, format=2))]),
        "has format 2",
    ),
    "no group": (whole([msgspec.msgpack.encode(SHORT), b"\xc0"]), "record 1 is no group"),
    "deeply nested": (
        whole([msgspec.msgpack.encode(SHORT), b"\x91" * 100_000]),
        "record 1 is no group",
    ),
    "text for tokens": (
        whole([msgspec.msgpack.encode(SHORT), SECOND.replace(b"\x93\x05\x06\x01", b"\xa3abc", 1)]),
        "record 1 is no group",
    ),
    "other samples": (
        whole(content(header=msgspec.structs.replace(HEADER, samples=3))),
        "record 1 has not 3 judged samples",
    ),
    "a token without its log-probability": (
        whole([msgspec.msgpack.encode(SHORT), UNEVEN]),
        "one log-probability a token",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, named = DAMAGE[name]
    with pytest.raises(DamagedRecord, match=named) as error:
        decode_groups(data)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_header_is_read_from_the_head_of_a_long_file(tmp_path: Path) -> None:
    path = write_groups(tmp_path, HEADER, [make_group("a", "x" * 200_000), make_group("b")])
    assert read_header(path) == HEADER
    path.write_bytes(b"")
    with pytest.raises(DamagedRecord):
        read_header(path)


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "recorded").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="recorded"):
        write_groups(tmp_path / "recorded", HEADER, GROUPS)
    assert [path.name for path in tmp_path.iterdir()] == ["recorded"]


def test_frames_of_nothing_are_a_mark() -> None:
    assert whole([]) == MARK
    assert list(read_frames(MARK)) == []
