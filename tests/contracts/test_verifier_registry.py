"""Verifiers by name and by a user's file, in the same sandbox, chosen by the data source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.types import Outcome
from megatron_oreal.verify.cascade import Answer, Verifier

if TYPE_CHECKING:
    from pathlib import Path

USERS = """
def starts(gold, answer):
    return answer.startswith(gold)

def decide(gold, answer):
    if answer == "hang":
        while True:
            pass
    if answer == "raise":
        raise KeyError(answer)
    if answer == "number":
        return 1
    if answer == "none":
        return None
    if answer == "write":
        open({canary!r}, "w")
    if answer == "run":
        eval("1+1")
    if answer == "shell":
        __import__("os").system("true")
    if answer == "socket":
        __import__("socket").socket()
    return gold == answer
"""


def test_the_data_source_chooses(tmp_path: Path) -> None:
    file = tmp_path / "users.py"
    file.write_text(USERS.format(canary=str(tmp_path / "canary")))
    routes = ("texts=exact", f"mine={file}:starts")
    asked = [("", "1/2", "0.5"), ("texts", "1/2", "0.5"), ("texts", "a b", " a  b "),
             ("mine", "a", "abc"), ("mine", "a", "bca")]  # fmt: skip
    answers = [
        Answer(gold, rf"\boxed{{{text}}}", stopped=True, data_source=source)
        for source, gold, text in asked
    ]
    with Verifier(VerifierConfig(routes=routes)) as verifier:
        outcomes = [verdict.outcome.value for verdict in verifier.judge(answers)]
    assert outcomes == ["correct", "incorrect", "correct", "correct", "incorrect"]


def test_a_users_function_is_held_by_the_same_sandbox(tmp_path: Path) -> None:
    file, canary = tmp_path / "users.py", tmp_path / "canary"
    file.write_text(USERS.format(canary=str(canary)))
    texts = ["hang", "raise", "number", "none", "write", "run", "shell", "socket"]
    answers = [Answer(text, rf"\boxed{{{text}}}", stopped=True) for text in (*texts, "fine")]
    config = VerifierConfig(default=f"{file}:decide", cpu_deadline_s=1.0, wall_deadline_s=30.0)
    with Verifier(config) as verifier:
        *held, fine = verifier.judge(answers)
    assert {verdict.outcome for verdict in held} == {Outcome.UNVERIFIED}
    assert held[0].reason == "more than 1 s of processor time"
    assert [verdict.reason for verdict in held[4:]] == ["the verifier raised PermissionError"] * 4
    assert fine.outcome is Outcome.CORRECT
    assert not canary.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VerifierConfig(default="maths"), "verifier.default=maths: no such verifier"),
        (VerifierConfig(routes=("gsm8k",)), r"verifier.routes=\[gsm8k\]: write"),
        (VerifierConfig(routes=("a=nowhere.py:f",)), "nowhere.py:f: there is no such file"),
        (VerifierConfig(routes=("a=nowhere.py",)), "nowhere.py: no such verifier"),
    ],
)
def test_a_route_to_nowhere_is_told_at_the_start(config: VerifierConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Verifier(config)
