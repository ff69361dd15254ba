"""A small run's folder, left by the writers of a real one: what the report is tested on."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_oreal.config.load import resolve_config_yaml
from megatron_oreal.config.schema import Config, RunConfig, ScheduleConfig
from megatron_oreal.monitor import alarms
from megatron_oreal.monitor.alarms import AlarmEvent
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.monitor.sinks import JsonlSink
from megatron_oreal.monitor.transcripts import write_transcripts
from megatron_oreal.types import (
    Outcome,
    PackedBatch,
    Prompt,
    Rollout,
    RolloutGroup,
    Trajectory,
    Verdict,
)

WORDS = (b"\\(", b"2", b"+", b"3", b"\\)", b"=", b"5", b"6", b"\\boxed{", b"}", b"\xc3", b"\xa9")
HOSTILE = (
    '<script>document.title="gone"</script>"><img src=x onerror=alert(1)> \x1b[31mred\u202etfel'
)
LINK = r"$\href{javascript:alert(1)}{x}\includegraphics{http://example.org/x.png}$"
RIGHT, WRONG = (0, 1, 2, 3, 4, 5, 8, 6, 9, 10, 11), (0, 1, 2, 3, 4, 5, 8, 7, 9)
# s_t of the wrong answer: believed until it has read token 7, "6"
SCORES = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -15.0)
FALL = 7
ALARMS = (
    AlarmEvent(1, "began", "unverified", 0.25, 0.1, 1, "alarm", "read <b>why</b>", "alarm: ..."),
    AlarmEvent(2, "ended", "unverified", 0.0, 0.1, 1, "alarm", "read <b>why</b>", "alarm over"),
    AlarmEvent(3, "began", "entropy", 0.01, 0.02, 3, "skip", "lower the rate", "alarm: ..."),
)


def make_run(
    root: Path, *, iterations: int = 4, finished: bool = True, hostile: bool = True
) -> Path:
    """Writes a run of so many iterations: metrics, two evaluations, two alarms, transcripts."""
    folder = RunFolder(root)
    config = Config(
        run=RunConfig(name="tiny", folder=str(root)), schedule=ScheduleConfig(iterations=iterations)
    )
    folder.create(resolve_config_yaml(config))
    folder.write_vocabulary(WORDS)
    sink = JsonlSink(folder.metrics)
    sink.write(0, {"eval/pass_at_1": 0.25, "eval/greedy": 0.5, "time/evaluate_s": 1.0}, "eval")
    for iteration in range(iterations):
        write_iteration(folder, sink, iteration, hostile=hostile)
    sink.write(iterations, {"eval/pass_at_1": 0.75, "eval/greedy": 0.5}, "eval")
    sink.close()
    alarms.append(folder.alarms, ALARMS)
    traces = folder.profile / "iteration_000002"
    traces.mkdir(parents=True)
    (traces / "rank_0.policy.trace.json.gz").touch()
    if finished:
        folder.write_summary({"hf": None})
    return root


def write_iteration(
    folder: RunFolder, sink: JsonlSink, iteration: int, *, hostile: bool = False
) -> None:
    """Writes an iteration's line and its transcripts: three questions, one of them trained on."""
    sink.write(
        iteration,
        {
            "rollout/pass_rate": 0.25 + 0.125 * iteration,
            "token_rm/auc": 0.5 + 0.1 * iteration,
            "oreal/loss": 1.0 / (1 + iteration),
            "oreal/entropy": 0.5,
            "rollout/unverified_share": 0.25 if iteration == 1 else 0.0,
            "time/generate_s": 6.0,
            "time/policy_s": 3.0,
            "time/iteration_s": 9.0,
        },
    )
    groups = [_group(iteration, "sum", 0.5), _group(iteration, "all", 1.0)]
    groups += [_group(iteration, HOSTILE, 0.0, HOSTILE)] if hostile else []
    write_transcripts(folder.rollouts, iteration, groups, count=8, seed=0, batch=_batch(iteration))


def _group(iteration: int, name: str, pass_rate: float, response: str = "") -> RolloutGroup:
    right = [pass_rate == 1, pass_rate > 0]
    outcomes = [Outcome.CORRECT if each else Outcome.INCORRECT for each in right]
    return RolloutGroup(
        prompt=Prompt(f"{name}-{iteration}", f"What is $2+3$? {LINK} {response}", "5", (0,)),
        rollouts=tuple(_rollout(each, response) for each in right),
        verdicts=tuple(
            Verdict(o, "rule", "not equal", "56"[not r], 0.0)
            for o, r in zip(outcomes, right, strict=True)
        ),
        rewards=tuple(1.0 if each else -1.0 for each in right),
        advantages=tuple(2 * each - 2 * pass_rate for each in right),
        pass_rate=pass_rate,
    )


def _rollout(right: bool, response: str) -> Rollout:
    tokens = RIGHT if right else WRONG
    text = response or b"".join(WORDS[token] for token in tokens).decode()
    return Rollout(tokens, tuple(-0.125 * (i + 1) for i in range(len(tokens))), text, stopped=True)


def _batch(iteration: int) -> PackedBatch:
    """The pair of the first question: fields a person can check."""
    pair = [
        Trajectory(f"sum-{iteration}", (0, *tokens), 1, reward, reward)
        for tokens, reward in ((WRONG, -1.0), (RIGHT, 1.0))
    ]
    lengths = [len(WRONG), len(RIGHT)]
    steps = [torch.arange(1, n + 1) for n in lengths]
    return PackedBatch(
        tuple(pair),
        (((0, 1),),),
        {
            "logprobs": [-0.125 * step + 0.0625 for step in steps],
            "reference_logprobs": [-0.125 * step - 0.1875 for step in steps],
            "entropy": [0.25 * step for step in steps],
            "token_score": [torch.tensor(SCORES), torch.linspace(0, 1, lengths[1])],
            "token_weight": [(step - 1) / 16 for step in steps],
        },
    )
