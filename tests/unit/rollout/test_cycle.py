from __future__ import annotations

import pytest

from megatron_oreal.rollout.cycle import Cycle, State, Step, WrongOrderError

ROUND: tuple[Step, ...] = ("sleep", "wake_weights", "write", "wake_cache", "generate")


def take(cycle: Cycle, *steps: Step) -> list[bool]:
    due = []
    for step in steps:
        with cycle.step(step) as one:
            due.append(one)
    return due


def test_a_round_does_every_step_and_ends_where_it_began():
    cycle = Cycle()
    assert take(cycle, *ROUND, *ROUND) == [True] * 10
    assert cycle.state == "generating"


@pytest.mark.parametrize("taken", range(1, 4))
def test_a_step_taken_twice_does_nothing_the_second_time(taken: int):
    cycle = Cycle()
    take(cycle, *ROUND[:taken])
    assert take(cycle, ROUND[taken - 1]) == [False]


def test_awake_there_is_nothing_to_wake_and_weights_may_be_written():
    assert take(Cycle(), "wake_weights", "write", "wake_cache", "generate") == [
        *[False] * 3,
        True,
    ]


@pytest.mark.parametrize(
    ("state", "step", "allowed"),
    [
        ("asleep", "generate", "generating"),
        ("asleep", "write", "weights awake"),
        ("asleep", "wake_cache", "weights written"),
        ("weights awake", "generate", "generating"),
        ("weights awake", "wake_cache", "weights written"),
        ("weights awake", "sleep", "generating"),
        ("weights written", "generate", "generating"),
        ("weights written", "sleep", "generating"),
    ],
)
def test_a_step_out_of_order_names_the_state(state: State, step: Step, allowed: str):
    text = f"rollout engine: {step} while {state}, not {allowed}"
    with pytest.raises(WrongOrderError, match=text):
        take(Cycle(state), step)


def test_a_step_that_fails_is_not_taken():
    cycle = Cycle()
    take(cycle, "sleep", "wake_weights")
    with pytest.raises(KeyError), cycle.step("write"):
        raise KeyError
    assert cycle.state == "weights awake"
