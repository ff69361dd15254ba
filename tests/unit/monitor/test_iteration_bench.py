"""The benchmark of a whole iteration on clocks that a person can add up."""

from __future__ import annotations

import pytest

from megatron_oreal.config.errors import UserError
from tools.bench.iteration import shares, table


def line(wall: float, **phases: float) -> dict[str, float]:
    return {f"time/{name}_s": seconds for name, seconds in phases.items()} | {
        "time/wall_s": wall,
        "time/iteration_s": sum(phases.values()),
        "time/last_verdict_wait_s": 50.0,
    }


def test_what_is_no_work_is_outside() -> None:
    """Of 100 s: 60 generation, 5 verification, 25 training; 4 of sync and sleep, 6 in between."""
    work = {"generate": 60.0, "verify": 5.0, "token_rm": 10.0, "reference": 5.0, "policy": 10.0}
    compiles = line(900.0, generate=800.0, policy=50.0)
    frozen = line(50.0, generate=50.0)
    usual = line(100.0, **work, sync=3.0, sleep=1.0)
    found = shares([compiles, usual, frozen, usual])
    assert (found["iterations"], found["wall_s"]) == (2, 100.0)
    assert list(found["seconds"])[:2] == ["generate", "token_rm"]
    assert found["seconds"]["between phases"] == 6.0
    assert found["generation_share"] == 0.6
    assert found["verification_share"] == 0.05
    assert found["training_share"] == 0.25
    assert found["outside_share"] == pytest.approx(0.10)
    assert "generate" in table(found)


def test_a_run_that_never_trained_says_so() -> None:
    with pytest.raises(UserError, match="no iteration after the first has trained the policy"):
        shares([line(1.0, policy=1.0), line(1.0, generate=1.0)])
