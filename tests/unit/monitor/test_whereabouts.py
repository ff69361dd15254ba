"""Where ranks are: read back, and whose process is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_oreal.monitor import pending, whereabouts
from megatron_oreal.monitor.ending import late, listed
from megatron_oreal.monitor.whereabouts import Whereabouts, gone, read_all, this_process, write

HOST, PID, NAMESPACE = this_process()


def at(rank: int, phase: str = "policy", step: int = 7, **more: object) -> Whereabouts:
    where = Whereabouts(rank, HOST, PID, NAMESPACE, phase, 3, since=100.0, step=step)
    return whereabouts.msgspec.structs.replace(where, **more)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, at(0))
    write(tmp_path, at(0, step=8))
    write(tmp_path, at(2))
    (tmp_path / "rank_00001.json").write_text('{"rank": 1, ')  # no file of ours is ever torn
    assert read_all(tmp_path, 4) == [at(0, step=8), at(2)]
    assert [where.place for where in read_all(tmp_path, 1)] == ["policy of 3"]


def test_a_process_that_has_ended_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.monotonic() + 30
    while not gone([at(1, pid=process.pid)], HOST, NAMESPACE):  # nobody has waited for it yet
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.wait()
    lost = at(1, pid=process.pid)
    elsewhere = [at(2, pid=process.pid, host="other"), at(3, pid=process.pid, namespace="pid:[1]")]
    ended = at(4, "ended", pid=process.pid)
    assert gone([at(0), lost, *elsewhere, ended], HOST, NAMESPACE) == [lost]


EVERYBODY = (0, 1, 2)
SILENT = ", does not answer: stopped, or held by C code"


@pytest.mark.parametrize(
    ("everyone", "answered", "expected"),
    [
        ([at(0), at(1, "record", 6), at(2)], EVERYBODY, ["rank 1 (record of 3 for 20 s)"]),
        ([at(0), at(1, step=6), at(2)], (0, 2), [f"rank 1 (policy of 3 for 20 s{SILENT})"]),
        ([at(0), at(2)], (0, 2), ["rank 1 (never began)"]),
        ([at(0), at(1), at(2)], (1, 2), [f"rank 0 (policy of 3 for 20 s{SILENT})"]),
        (
            [at(0, collectives=5), at(1, collectives=5), at(2, collectives=4)],
            EVERYBODY,
            ["rank 2 (policy of 3 for 20 s)"],
        ),
        (
            [at(0, pending="barrier"), at(1), at(2, pending="barrier")],
            EVERYBODY,
            ["rank 1 (policy of 3 for 20 s)"],
        ),
        ([at(0), at(1), at(2)], EVERYBODY, []),
    ],
    ids=["earlier", "earlier, silent", "never", "silent", "exchanges", "no wait", "alike"],
)
def test_who_did_not_arrive(
    everyone: list[Whereabouts], answered: tuple[int, ...], expected: list[str]
) -> None:
    assert late(everyone, 3, answered, now=120.0) == expected


def test_of_many_ranks_eight_are_named() -> None:
    names = [str(rank) for rank in range(11)]
    assert listed(names) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
    assert listed(names[:2]) == "0, 1"


def test_waits_are_told_and_exchanges_counted() -> None:
    before = pending.collectives_begun()
    with pending.waiting(lambda: "judge"), pending.collective("barrier"):
        assert pending.pending() == "judge, in it barrier"
    assert pending.pending() == ""
    assert pending.collectives_begun() == before + 1
