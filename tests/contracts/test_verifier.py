"""What every verifier keeps to: right verdicts in order, and a trainer that always gets back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.types import Outcome
from megatron_oreal.verify import sandbox
from megatron_oreal.verify.cascade import Answer, Verifier
from megatron_oreal.verify.protocol import MAX_TEXT_CHARS, Pair
from megatron_oreal.verify.sandbox import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TABLE = Path(__file__).parents[1] / "unit" / "verify" / "equivalence.jsonl"
TOWER = "9^{9^{9^{9}}}"
DEEP = "(" * 900 + "42" + ")" * 900
EASY = Pair("42", "42", "exact")
DIFFERENT = Pair("42", "43", "exact")
SPIN = f"{Path(__file__).with_name('users_verifiers.py')}:spin"
HANG = Pair("42", "43", SPIN)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifierConfig(cpu_deadline_s=1.0, wall_deadline_s=20.0)) as made:
        yield made


class WatchedPool(WorkerPool):
    """A pool whose first worker is up, and whose processes a test can lay hands on.

    Its verifiers are those that start at once.
    """

    def __init__(
        self, workers: int = 1, cpu_deadline_s: float = 60.0, wall_deadline_s: float = 60.0
    ) -> None:
        self._others = set(workers_of(os.getpid()))
        super().__init__(workers, cpu_deadline_s, wall_deadline_s, verifiers=("exact", SPIN))
        self.compare([EASY])

    def living(self) -> list[psutil.Process]:
        return [worker for worker in workers_of(os.getpid()) if worker not in self._others]


@pytest.fixture
def pool() -> Iterator[WatchedPool]:
    with WatchedPool(cpu_deadline_s=0.5) as made:
        yield made


def workers_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if alive(child) and is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    return "megatron_oreal.verify.worker" in process.cmdline()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def cpu_time_s(process: psutil.Process) -> float:
    return process.cpu_times().user


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def box(answer: str) -> str:
    return rf"so the answer is \boxed{{{answer}}}"


@pytest.mark.parametrize(
    ("response", "stopped", "expected"),
    [
        (box("42"), True, (Outcome.CORRECT, "rule", "42")),
        (box("84/2"), True, (Outcome.CORRECT, "rule", "84/2")),
        (box("43"), True, (Outcome.INCORRECT, "rule", "43")),
        (box("42"), False, (Outcome.INCORRECT, "format", None)),
        ("42", True, (Outcome.INCORRECT, "format", None)),
        ("", True, (Outcome.INCORRECT, "format", None)),
        (box(""), True, (Outcome.INCORRECT, "format", "")),
        (box("42") + "</think> that is all", True, (Outcome.INCORRECT, "format", None)),
        (box("43") + "</think>" + box("42"), True, (Outcome.CORRECT, "rule", "42")),
        (box(TOWER), True, (Outcome.UNVERIFIED, "rule", TOWER)),
        (box("é" * MAX_TEXT_CHARS), True, (Outcome.UNVERIFIED, "rule", "é" * MAX_TEXT_CHARS)),
        (box("4" * (MAX_TEXT_CHARS + 1)), True, (Outcome.UNVERIFIED, "rule", "4" * 2001)),
        (box(DEEP), True, (Outcome.UNVERIFIED, "rule", DEEP)),
        (box("\x00"), True, (Outcome.UNVERIFIED, "rule", "\x00")),
        (box("\ud800"), True, (Outcome.UNVERIFIED, "rule", "?")),
        (box("42\n\n43"), True, (Outcome.INCORRECT, "rule", "42\n\n43")),
    ],
    ids=range(16),
)
def test_one_verdict(
    verifier: Verifier, response: str, stopped: bool, expected: tuple[Outcome, str, str | None]
) -> None:
    [verdict] = verifier.judge([Answer("42", response, stopped)])
    assert (verdict.outcome, verdict.by, verdict.extracted) == expected
    assert verdict.reason


def test_verdicts_come_in_order_and_progress_counts_to_the_end(verifier: Verifier) -> None:
    answers = [Answer(str(n), box(str(n - n % 3)), stopped=n % 5 > 0) for n in range(60)]
    seen: list[int] = []
    verdicts = verifier.judge(answers, seen.append)
    for n, verdict in enumerate(verdicts):
        right = n % 3 == 0 and n % 5 > 0
        assert verdict.outcome is (Outcome.CORRECT if right else Outcome.INCORRECT)
    assert seen == [1] * 60


def test_the_table_has_the_same_outcomes_in_the_sandbox(verifier: Verifier) -> None:
    rows = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    verdicts = verifier.judge([Answer(row["gold"], row["response"], stopped=True) for row in rows])
    for row, verdict in zip(rows, verdicts, strict=True):
        assert verdict.outcome.value == row["expected"], (row, verdict)


def test_no_answers_no_verdicts(verifier: Verifier) -> None:
    assert verifier.judge([]) == []


def test_a_hang_costs_its_deadline_and_the_next_question_nothing(pool: WatchedPool) -> None:
    hang, after = pool.compare([HANG, EASY])
    assert hang.outcome is Outcome.UNVERIFIED
    assert hang.reason == "more than 0.5 s of processor time"
    assert after.outcome is Outcome.CORRECT


def test_hangs_in_a_row_are_all_paid_and_all_told() -> None:
    pairs, wall_deadline_s = [HANG, EASY] * 3, 10.0
    with WatchedPool(2, cpu_deadline_s=0.3, wall_deadline_s=wall_deadline_s) as pool:
        started = time.monotonic()
        outcomes = [found.outcome for found in pool.compare(pairs)]
        assert time.monotonic() - started <= wall_deadline_s * len(pairs) / 2
    assert outcomes == [Outcome.UNVERIFIED, Outcome.CORRECT] * 3


def test_wall_time_ends_a_worker_that_burns_no_processor_time() -> None:
    with WatchedPool(wall_deadline_s=0.5) as pool:
        for worker in pool.living():
            worker.suspend()
        stopped, after = pool.compare([EASY, DIFFERENT])
        assert stopped.outcome is Outcome.UNVERIFIED
        assert stopped.reason == "more than 0.5 s of wall time"
        assert after.outcome in {Outcome.INCORRECT, Outcome.UNVERIFIED}  # the spare was stopped too
        assert pool.compare([EASY])[0].outcome is Outcome.CORRECT


def test_a_worker_killed_in_the_middle_of_a_pair_is_replaced() -> None:
    with WatchedPool() as pool:
        before = pool.living()
        killer = threading.Timer(0.5, lambda: max(before, key=cpu_time_s).kill())
        killer.start()
        killed, after = pool.compare([HANG, EASY])
        killer.join()
        assert killed.outcome is Outcome.UNVERIFIED
        assert killed.reason == "the worker died: SIGKILL"
        assert after.outcome is Outcome.CORRECT
        assert sum(map(alive, before)) == 1  # the spare, which stepped in
        assert len(pool.living()) == 2


def test_a_worker_killed_while_idle_costs_no_answer(pool: WatchedPool) -> None:
    for worker in pool.living():
        worker.kill()
        wait_until(lambda dying=worker: not alive(dying))
    assert pool.compare([EASY])[0].outcome is Outcome.CORRECT


def test_an_interrupted_call_leaves_nothing_behind_for_the_next(pool: WatchedPool) -> None:
    def interrupt(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.compare([EASY, HANG], interrupt)
    found = pool.compare([DIFFERENT, EASY])
    assert [one.outcome for one in found] == [Outcome.INCORRECT, Outcome.CORRECT]


def test_memory_is_bounded(pool: WatchedPool) -> None:
    def limits(kind: int) -> list[int]:
        return [worker.rlimit(kind)[0] for worker in pool.living()]

    wait_until(lambda: limits(psutil.RLIMIT_FSIZE) == [0, 0])
    wait_until(lambda: limits(psutil.RLIMIT_AS) == [sandbox.WORKER_MEMORY_BYTES] * 2)


def test_a_worker_inherits_neither_files_nor_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    with (tmp_path / "open").open("w") as held, socket.create_server(("localhost", 0)) as port:
        os.set_inheritable(held.fileno(), True)
        port.set_inheritable(True)
        with WatchedPool() as pool:
            for worker in pool.living():
                assert held.name not in [file.path for file in worker.open_files()]
                assert worker.net_connections() == []
                assert "SECRET" not in worker.environ()
                assert "torch" not in " ".join(m.path for m in worker.memory_maps())


def test_close_leaves_no_process() -> None:
    with WatchedPool(workers=2) as pool:
        mine = pool.living()
        assert len(mine) == 3
    assert not any(alive(worker) for worker in mine)


def test_workers_die_with_a_parent_that_is_killed() -> None:
    program = (
        "from megatron_oreal.verify.sandbox import WorkerPool\n"
        "from megatron_oreal.verify.protocol import Pair\n"
        f"pool = WorkerPool(1, 60.0, 60.0, verifiers=('exact', {SPIN!r}))\n"
        "pool.compare([Pair('42', '42', 'exact')])\n"
        "print('up', flush=True)\n"
        f"pool.compare([Pair('42', '43', {SPIN!r})])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    orphans = workers_of(parent.pid)
    assert orphans
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(alive(orphan) for orphan in orphans), timeout_s=5.0)


def test_a_worker_that_cannot_start_is_an_error_and_no_hang() -> None:
    with (
        WorkerPool(1, cpu_deadline_s=1.0, wall_deadline_s=20.0, memory_bytes=1 << 20) as pool,
        pytest.raises(RuntimeError, match="could not start"),
    ):
        pool.compare([EASY])


def test_without_math_verify_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="pip install 'math-verify'"):
        Verifier(VerifierConfig())


def test_ordinary_answers_are_judged_at_a_measured_rate(verifier: Verifier) -> None:
    forms = [("{0}", "{0}"), ("{0}", "{0}.0"), (r"\frac{{{0}}}{{7}}", "{0}/7"), ("{0}", "{0}1")]
    answers = []
    for n in range(256):
        gold, answer = forms[n % 4]
        answers.append(Answer(gold.format(n + 2), box(answer.format(n + 2)), stopped=True))
    start = time.perf_counter()
    verdicts = verifier.judge(answers)
    rate = len(answers) / (time.perf_counter() - start)
    print(f"256 ordinary answers on one worker: {rate:.0f} answers/s")  # noqa: T201
    correct = [verdict.outcome is Outcome.CORRECT for verdict in verdicts]
    assert correct == [n % 4 != 3 for n in range(256)]
