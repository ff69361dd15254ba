"""What a bank gives back after a crash, and that it names what it cannot."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.rollout.bank import Banks
from megatron_oreal.rollout.bank_file import BankFile, read_bank_file
from megatron_oreal.rollout.frames import MARK, framed
from megatron_oreal.rollout.record import FORMAT, RecordHeader
from megatron_oreal.types import Outcome, Prompt, Rollout, Verdict

HEADER = RecordHeader(FORMAT, iteration=3, seed=7, questions=1, samples=4, vocabulary="v")
PROMPTS = [Prompt("a", "1+0", "1", (2, 3))]
ROLLOUTS = [
    Rollout((5, index), (-0.1, -0.30000000000000004), f"\\boxed{{{index}}}", stopped=True)
    for index in range(4)
]
VERDICT = Verdict(Outcome.CORRECT, "rule", "equal", "1", 0.01)
NAME = "iteration_000003.rank_00000"

pytestmark = pytest.mark.usefixtures("world_of_one")


@pytest.fixture
def banks(tmp_path: Path) -> Banks:
    """Of an earlier process, which had banked all four responses and judged the second."""
    banks = Banks(tmp_path)
    with banks.open(HEADER, PROMPTS) as bank:
        assert not bank.entries
        for index, rollout in enumerate(ROLLOUTS):
            bank.put(index, rollout)
        bank.put(1, ROLLOUTS[1], VERDICT)
    return banks


def contents(banks: Banks) -> tuple[dict[int, Rollout], tuple[str, ...]]:
    with banks.open(HEADER, PROMPTS) as bank:
        return {index: entry.rollout for index, entry in bank.entries.items()}, bank.problems


def test_what_was_put_in_comes_back_exactly(banks: Banks) -> None:
    with banks.open(HEADER, PROMPTS) as bank:
        assert {index: entry.rollout for index, entry in bank.entries.items()} == dict(
            enumerate(ROLLOUTS)
        )
        assert bank.verdicts == {1: VERDICT}
        assert bank.problems == ()


# What decides a generation, each otherwise than in `HEADER` and `PROMPTS`.
OTHERS = {
    "weights or settings": (msgspec.structs.replace(HEADER, sampled_by="x"), PROMPTS),
    "seed": (msgspec.structs.replace(HEADER, seed=8), PROMPTS),
    "prompt": (HEADER, [Prompt("a", "1+0", "1", (2, 4))]),
    "question": (HEADER, [Prompt("b", "1+0", "1", (2, 3))]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_of_another_generation_is_taken(banks: Banks, name: str) -> None:
    header, prompts = OTHERS[name]
    with banks.open(header, prompts) as bank:
        assert (bank.entries, bank.problems) == ({}, ())
        bank.put(0, ROLLOUTS[0])
    assert contents(banks) == (dict(enumerate(ROLLOUTS)), ())  # both lie in one file


def test_a_torn_record_costs_itself_and_what_comes_after_it_is_read(banks: Banks) -> None:
    path = banks.folder / NAME
    path.write_bytes(path.read_bytes()[:-3])  # in the second entry of the second response
    named = f"{path}: ends inside record 4; its responses are sampled again"
    with banks.open(HEADER, PROMPTS) as bank:
        assert len(bank.entries) == 4
        assert bank.verdicts == {}
        assert bank.problems == (named,)
        bank.put(1, ROLLOUTS[1], VERDICT)
    with banks.open(HEADER, PROMPTS) as bank:
        assert bank.verdicts == {1: VERDICT}
        assert bank.problems == (named,)


@given(st.data())
def test_one_changed_byte_costs_one_record(data: st.DataObject) -> None:
    records = [b"a" * 9, b"b", b"", b"c" * 20]
    whole = bytearray(b"".join(part for record in records for part in framed([record])))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    kept, problems = read_bank_file(bytes(whole))
    assert len(problems) == 1
    assert len(kept) == 3
    assert all(record in records for record in kept)


# (what lies there, what is named)
DAMAGE = {
    "text": (b"hello world", "does not begin with a record"),
    "a pickle": (b"".join(framed([pickle.dumps(Path())])), "a record is no entry"),
    "another structure": (b"".join(framed([msgspec.msgpack.encode({"a": 1})])), "is no entry"),
    "no record": (MARK, ""),
    "nothing": (b"", ""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_bank_is_named(tmp_path: Path, name: str) -> None:
    data, named = DAMAGE[name]
    (tmp_path / NAME).write_bytes(data)
    entries, problems = contents(Banks(tmp_path))
    assert entries == {}
    assert len(problems) == bool(named)
    assert all(named in problem and NAME in problem for problem in problems)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert contents(Banks(tmp_path))[1] == (
        f"{tmp_path / NAME}: Is a directory; its responses are sampled again",
    )


def test_banks_go_once_a_checkpoint_is_past_them(banks: Banks) -> None:
    banks.forget(3)
    assert len(contents(banks)[0]) == 4
    banks.forget(4)
    assert list(banks.folder.iterdir()) == []


def test_a_disk_that_refuses_is_named_and_costs_the_records_alone(tmp_path: Path) -> None:
    file = BankFile(tmp_path / "gone" / NAME)
    file.append(b"first")
    file.append(b"second")
    file.close()
    assert file.problem.startswith(f"{tmp_path / 'gone' / NAME}: ")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        file = BankFile(tmp_path / NAME)
        file.append(b"a" * 50)
        file.append(b"b" * 5000)
        file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in file.problem
    kept, _ = read_bank_file((tmp_path / NAME).read_bytes())
    assert kept in ([], [b"a" * 50])  # whether both were written at once


def test_a_killed_process_leaves_what_it_had_banked(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time; from pathlib import Path;"
        "from megatron_oreal.rollout.bank_file import BankFile;"
        "path = Path(sys.argv[1]); file = BankFile(path);"
        "[file.append(bytes([n])) for n in range(3)];\n"
        "while not (path.exists() and path.read_bytes().count(b'OREALgr') == 3): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / NAME)]
    done = subprocess.run(command, check=False, timeout=60, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert read_bank_file((tmp_path / NAME).read_bytes()) == ([b"\0", b"\1", b"\2"], [])
