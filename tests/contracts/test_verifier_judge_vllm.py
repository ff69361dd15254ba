"""The judge against vLLM's own OpenAI server, which serves a model whose replies are known."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.schema import JudgeConfig, VerifierConfig
from megatron_oreal.types import Outcome
from megatron_oreal.verify.cascade import Answer, Verifier
from megatron_oreal.verify.judge import Judge
from megatron_oreal.verify.judge_prompt import JudgeQuestion
from tests.contracts.judge_model import WINDOW, write_judge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_S = 540.0  # 40 s on an idle machine
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_S + 60.0)]

SETTINGS = {"attempts": 2, "backoff_s": 0.1, "request_deadline_s": 60.0, "max_tokens": 16}


class VllmServer:
    """`vllm serve`, ready after `wait`."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.log = log
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
                 "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port),
                 "--dtype", "float32", "--enforce-eager", "--max-model-len", str(WINDOW),
                 "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 26)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while not self._healthy():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.5)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("judge")
    write_judge(folder / "model")
    started = VllmServer(folder / "model", folder / "server.log")
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def test_each_question_gets_its_own_verdict_and_none_is_lost(server: VllmServer) -> None:
    asked = [JudgeQuestion(text, "5", "five", "so it is five") for text in ("RIGHT", "WRONG", "?")]
    with contextlib.closing(
        Judge(JudgeConfig("undecided", (server.url,), "judge", **SETTINGS))
    ) as judge:
        verdicts = judge.ask(asked * 8)
    assert [verdict.outcome.value for verdict in verdicts] == [
        "correct", "incorrect", "unverified",
    ] * 8  # fmt: skip
    cut = {verdict.reason for verdict in verdicts if verdict.outcome is Outcome.UNVERIFIED}
    assert cut == {"no judge answered: UnfinishedReplyError"}  # a reply without end is none


def test_a_model_that_the_server_does_not_have_leaves_the_answer_undecided(
    server: VllmServer,
) -> None:
    config = JudgeConfig("undecided", (server.url,), "another", **SETTINGS)
    with contextlib.closing(Judge(config)) as judge:
        [verdict] = judge.ask([JudgeQuestion("RIGHT", "5", "five", "")])
    assert verdict.reason == "no judge answered: NotFoundError"


def test_when_the_server_is_gone_the_run_goes_on(server: VllmServer) -> None:
    config = JudgeConfig("not_correct", (server.url,), "judge", **SETTINGS)
    answers = [Answer("5", rf"\boxed{{{text}}}", stopped=True, question="RIGHT") for text in "567"]
    with Verifier(VerifierConfig(default="exact"), config) as verifier:
        before = verifier.judge(answers)
        server.stop()
        after = verifier.judge(answers)
    assert [(v.outcome.value, v.by) for v in before] == [
        ("correct", "rule"), ("correct", "judge"), ("correct", "judge"),
    ]  # fmt: skip
    assert [(v.outcome.value, v.by) for v in after] == [
        ("correct", "rule"), ("unverified", "judge"), ("unverified", "judge"),
    ]  # fmt: skip
