"""Hostile answers: nothing runs or hangs, nothing is called correct, and the next is served."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.types import Outcome
from megatron_oreal.verify.cascade import Answer, Verifier
from tests.contracts.hostile_answers import CORRECT_ALL_THE_SAME, WRONG, box

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WALL_DEADLINE_S = 10.0  # the default
GRACE_S = 0.5
NEXT = Answer("1/2", box("0.5"), stopped=True)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    config = VerifierConfig(cpu_deadline_s=1.0, wall_deadline_s=WALL_DEADLINE_S)
    with Verifier(config) as made:
        made.judge([NEXT])
        yield made


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "canary"


def test_there_are_enough() -> None:
    assert len(WRONG) + len(CORRECT_ALL_THE_SAME) >= 60


@pytest.mark.parametrize(("name", "gold", "response"), WRONG, ids=[row[0] for row in WRONG])
def test_hostile(verifier: Verifier, canary: Path, name: str, gold: str, response: str) -> None:
    attack = Answer(gold, response.replace("CANARY", str(canary)), stopped=True)
    before = time.thread_time()
    verdict, after = verifier.judge([attack, NEXT])
    assert time.thread_time() - before <= GRACE_S  # the trainer's own part: extraction
    assert verdict.outcome is not Outcome.CORRECT, verdict.reason
    assert verdict.seconds <= WALL_DEADLINE_S + GRACE_S
    assert after.outcome is Outcome.CORRECT
    assert not canary.exists()


@pytest.mark.parametrize(("name", "gold", "response"), CORRECT_ALL_THE_SAME)
def test_noise_takes_nothing_from_a_right_answer(
    verifier: Verifier, name: str, gold: str, response: str
) -> None:
    [verdict] = verifier.judge([Answer(gold, response, stopped=True)])
    assert verdict.outcome is Outcome.CORRECT
