from __future__ import annotations

import time

import pytest

from megatron_oreal.monitor.timers import Timers


def test_seconds_add_up_by_phase_and_start_anew_each_iteration() -> None:
    timers = Timers(totals={"generate": 100.0})
    for _ in range(2):
        with timers.phase("generate"):
            time.sleep(0.01)
    with timers.phase("judge"):
        pass
    assert 0.02 <= timers.seconds("generate") < 1.0
    ended = timers.end_iteration()
    assert list(ended) == ["time/generate_s", "time/judge_s"]
    assert ended["time/generate_s"] >= 0.02
    assert timers.end_iteration() == {}
    assert timers.totals["generate"] == pytest.approx(100.0 + ended["time/generate_s"])


def test_a_phase_that_fails_is_counted_and_fails() -> None:
    timers = Timers()
    with pytest.raises(RuntimeError, match="boom"), timers.phase("judge"):
        raise RuntimeError("boom")
    assert timers.seconds("judge") >= 0.0


def test_the_device_is_waited_for_at_both_ends() -> None:
    calls: list[str] = []
    with Timers(synchronize=lambda: calls.append("wait")).phase("train"):
        calls.append("work")
    assert calls == ["wait", "work", "wait"]
