"""When alarms begin and end, what they do, and the file that remembers it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_oreal.config.schema import Config, VerifierConfig
from megatron_oreal.config.schema_health import AlarmsConfig
from megatron_oreal.monitor.alarms import Alarms, Rule, append, drop_later, rules_of

NAN, INF = float("nan"), float("inf")


def low(iterations: int = 2, action: str = "alarm") -> Rule:
    return Rule("entropy", "alarms.min_entropy", 0.5, False, iterations, action, "do this")


def high(iterations: int = 1, action: str = "alarm") -> Rule:
    return Rule("mismatch", "alarms.max_mismatch", 0.1, True, iterations, action, "do that")


@pytest.mark.parametrize(
    ("rule", "value", "beyond"),
    [
        (low(), 0.4, True),
        (low(), 0.5, False),
        (low(), NAN, True),
        (low(), -INF, True),
        (high(), 0.1, False),
        (high(), 0.11, True),
        (high(), INF, True),
        (high(), NAN, True),
    ],
)
def test_a_bound_may_be_reached_and_not_passed(rule: Rule, value: float, beyond: bool) -> None:
    assert rule.is_beyond(value) == beyond


def test_an_alarm_begins_once_and_ends_once() -> None:
    alarms = Alarms([low()])
    seen = []
    for iteration, value in enumerate([0.4, 0.6, 0.4, 0.3, 0.2, None, 0.1, 0.7, 0.8]):
        values = {} if value is None else {"entropy": value}
        seen += [
            (e.iteration, e.event, e.value, e.in_a_row) for e in alarms.observe(iteration, values)
        ]
    # One iteration is not enough, one without a value counts neither way.
    assert seen == [(3, "began", 0.3, 2), (7, "ended", 0.7, 4)]


def test_a_resumed_run_goes_on_counting() -> None:
    alarms = Alarms([low(3)])
    alarms.observe(0, {"entropy": 0.4})
    alarms.observe(1, {"entropy": 0.4})
    assert alarms.in_a_row == {"entropy": 2}
    (event,) = Alarms([low(3)], alarms.in_a_row).observe(2, {"entropy": 0.4})
    assert (event.event, event.in_a_row) == ("began", 3)


def test_a_rule_acts_from_the_iteration_that_its_alarm_begins_with() -> None:
    alarms = Alarms([low(2, "skip"), high(1, "stop")])
    beyond = {"entropy": 0.1, "mismatch": 0.2}
    assert alarms.acting(beyond, "skip") == []  # the first in a row of two
    assert alarms.acting(beyond, "stop") == [high(1, "stop")]
    alarms.observe(0, beyond)
    assert alarms.acting(beyond, "skip") == [low(2, "skip")]
    assert (
        alarms.acting({"mismatch": 0.0}, "skip") == alarms.acting({"mismatch": 0.0}, "stop") == []
    )


def test_the_rules_of_a_config() -> None:
    silent = AlarmsConfig(
        min_pass_rate=0,
        min_entropy=0,
        max_mismatch=0,
        min_engine_share=0,
        max_memory_share=0,
        on_engine_logprobs="stop",
    )
    rules = {rule.kind: rule for rule in rules_of(Config(alarms=silent))}
    assert rules.keys() == {"engine_logprobs", "not_finite", "unverified"}
    assert rules["engine_logprobs"].action == "stop"
    settings = AlarmsConfig(min_pass_rate=0.2, iterations=4, on_pass_rate="skip")
    config = Config(alarms=settings, verifier=VerifierConfig(unverified_alarm_share=0.25))
    rules = {rule.kind: rule for rule in rules_of(config)}
    rule = rules["pass_rate"]
    assert (rule.bound, rule.above, rule.iterations, rule.action) == (0.2, False, 4, "skip")
    assert (rules["unverified"].bound, rules["unverified"].iterations) == (0.25, 1)
    assert rules["mismatch"].above
    assert not rules["entropy"].above
    straggler = rules["straggler"]
    assert (straggler.bound, straggler.above, straggler.iterations) == (0.5, False, 4)
    assert straggler.action == "alarm"
    memory = rules_of(Config(alarms=AlarmsConfig(on_memory="stop")))
    (memory,) = (rule for rule in memory if rule.kind == "memory")
    assert (memory.bound, memory.above, memory.iterations) == (1.1, True, 1)
    assert memory.action == "stop"


def test_what_the_console_says() -> None:
    rules = [low(), high()]
    alarms = Alarms(rules, {"entropy": 1})
    began = alarms.observe(7, {"entropy": 0.25, "mismatch": INF})
    assert [event.text for event in began] == [
        "alarm at iteration 7: entropy 0.25 below 0.5 (alarms.min_entropy), 2 iterations in a row:"
        " do this",
        "alarm at iteration 7: mismatch inf above 0.1 (alarms.max_mismatch): do that",
    ]
    (ended,) = alarms.observe(8, {"entropy": 0.75})
    assert ended.text == "alarm over at iteration 8: entropy 0.75"


def test_the_file_holds_what_a_resumed_run_does_not_do_again(tmp_path: Path) -> None:
    path = tmp_path / "alarms.jsonl"
    drop_later(path, 0)
    assert not path.exists()
    alarms = Alarms([low(1), high()])
    for iteration, value in enumerate([0.25, 0.75, NAN]):
        append(path, alarms.observe(iteration, {"entropy": value}))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {
        "iteration": 0,
        "event": "began",
        "kind": "entropy",
        "value": 0.25,
        "bound": 0.5,
        "in_a_row": 1,
        "action": "alarm",
        "advice": "do this",
        "text": "alarm at iteration 0: entropy 0.25 below 0.5 (alarms.min_entropy): do this",
    }
    assert [(line["event"], line["value"]) for line in lines[1:]] == [
        ("ended", 0.75),
        ("began", "nan"),
    ]
    with path.open("a") as file:
        file.write('{"iteration": 1, "ev')  # torn by a kill
    drop_later(path, 2)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1]
