"""The first signal asks, the second ends; the handlers of before come back."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from megatron_oreal.trainer.resume import STOP_SIGNALS, stop_on_signal

TWICE = """
import signal
from megatron_oreal.trainer.resume import stop_on_signal
with stop_on_signal():
    signal.raise_signal(signal.SIGUSR1)
    print("asked", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not reached", flush=True)
"""


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with stop_on_signal() as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed()
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_a_second_signal_ends_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWICE], capture_output=True, text=True, check=False
    )
    assert ended.stdout == "asked\n"
    assert ended.returncode == -signal.SIGTERM
