from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from megatron_oreal.monitor.transcripts import (
    TOKEN_DTYPE,
    read_lines,
    read_tokens,
    running_q,
    write_transcripts,
)
from megatron_oreal.types import (
    Outcome,
    PackedBatch,
    Prompt,
    Rollout,
    RolloutGroup,
    Trajectory,
    Verdict,
)

if TYPE_CHECKING:
    from pathlib import Path


def group(index: int, samples: int = 4) -> RolloutGroup:
    return RolloutGroup(
        prompt=Prompt(id=f"q{index}", question="1+1?", gold_answer="2", tokens=(7, 8)),
        rollouts=tuple(
            Rollout(tokens=(index, k), logprobs=(-0.5, -0.25), text=f"{index}/{k}", stopped=True)
            for k in range(samples)
        ),
        verdicts=tuple(
            Verdict(Outcome.CORRECT, by="rule", reason="equal", extracted="2", seconds=0.125)
            for _ in range(samples)
        ),
        rewards=(1.0,) * samples,
        advantages=(0.5,) * samples,
        pass_rate=1.0,
    )


def batch() -> PackedBatch:
    trajectory = Trajectory("q1", tokens=(7, 8, 1, 2), prompt_length=2, reward=1.0, advantage=0.5)
    fields = {
        "logprobs": [torch.tensor([-0.5, -0.3125])],
        "reference_logprobs": [torch.tensor([-0.25, -0.3125])],
        "entropy": [torch.tensor([1.5, 2.0])],
        "token_score": [torch.tensor([0.0, 2.0])],
        "token_weight": [torch.tensor([0.0, 0.5])],
    }
    return PackedBatch((trajectory,), (((0,),),), fields)


def read(path: Path | None) -> list[dict[str, Any]]:
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_record_holds_everything_of_its_rollout(tmp_path: Path) -> None:
    path = write_transcripts(tmp_path, 12, [group(0), group(1)], count=8, seed=0, batch=batch())
    records = read(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_000012.jsonl", "iter_000012.npz"]
    assert len(records) == 8
    assert records[6] == {
        "iteration": 12,
        "prompt_id": "q1",
        "sample": 2,
        "prompt": "1+1?",
        "gold_answer": "2",
        "response": "1/2",
        "response_length": 2,
        "stopped": True,
        "pass_rate": 1.0,
        "reward": 1.0,
        "advantage": 0.5,
        "outcome": "correct",
        "decided_by": "rule",
        "reason": "equal",
        "extracted": "2",
        "verify_s": 0.125,
        "trained": True,
        "score": 1.0,
    }
    assert [r["trained"] for r in records].count(True) == 1
    assert path is not None
    assert [line["line"] for line in read_lines(path)] == list(range(8))
    tokens = read_tokens(path, [6, 7, 8])
    assert tokens.keys() == {6, 7}
    # token, rollout, policy - rollout, reference - policy, entropy, score, weight
    assert tokens[6].tolist() == [
        (1, -0.5, 0.0, 0.25, 1.5, 0.0, 0.0),
        (2, -0.25, -0.0625, 0.0, 2.0, 2.0, 0.5),
    ]
    assert tokens[7]["token"].tolist() == [1, 3]
    assert all(np.isnan(tokens[7][name]).all() for name in (TOKEN_DTYPE.names or ())[2:])


def test_a_question_stands_with_its_correct_and_its_incorrect_answer(tmp_path: Path) -> None:
    groups = [group(i) for i in range(20)]
    pairs = [
        Trajectory(f"q{i}", (7, 8, i, k), prompt_length=2, reward=1.0, advantage=0.5)
        for i in range(20)
        for k in (1, 3)
    ]
    trained = PackedBatch(tuple(pairs), (((0,),),))
    records = read(write_transcripts(tmp_path, 0, groups, count=12, seed=0, batch=trained))
    drawn = [(r["prompt_id"], r["sample"]) for r in records if r["trained"]]
    whole = [prompt for prompt, sample in drawn if sample == 1 and (prompt, 3) in drawn]
    assert len(whole) >= 3


def test_running_mean_and_q() -> None:
    means, q = running_q(np.array([0.0, 2.0, -5.0], np.float16))
    assert means.tolist() == [0, 1, -1]
    assert q == pytest.approx([0.5, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])


@pytest.mark.parametrize("seed", range(10))
def test_half_of_the_sample_is_what_was_trained_on(tmp_path: Path, seed: int) -> None:
    groups = [group(i) for i in range(20)]
    records = read(write_transcripts(tmp_path, 0, groups, count=2, seed=seed, batch=batch()))
    assert len(records) == 2
    assert [r["trained"] for r in records].count(True) == 1


def test_the_sample_depends_on_seed_and_iteration_alone(tmp_path: Path) -> None:
    groups = [group(i) for i in range(20)]

    def drawn(iteration: int, seed: int) -> list[str]:
        path = write_transcripts(tmp_path, iteration, groups, count=5, seed=seed)
        return [record["response"] for record in read(path)]

    assert drawn(3, 1) == drawn(3, 1)
    assert len(set(drawn(3, 1))) == 5
    assert drawn(3, 1) != drawn(4, 1)
    assert drawn(3, 1) != drawn(3, 2)


def test_rollouts_not_yet_judged_and_hostile_text(tmp_path: Path) -> None:
    text = 'a\n{"kind"}\u2028\x00\ud800'
    rollout = Rollout(tokens=(1,), logprobs=(float("-inf"),), text=text, stopped=False)
    bare = RolloutGroup(group(0).prompt, (rollout,))
    path = write_transcripts(tmp_path, 0, [bare], count=3, seed=0)
    assert path is not None
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 2
    record = json.loads(lines[0])
    assert record["response"] == 'a\n{"kind"}\u2028\x00?'
    assert read_tokens(path, [0])[0]["rollout_logprob"].tolist() == [-np.inf]
    assert record["score"] is None
    assert record["reward"] is record["outcome"] is record["advantage"] is None


def test_nothing_asked_for_or_nothing_there_writes_no_file(tmp_path: Path) -> None:
    assert write_transcripts(tmp_path, 0, [group(0)], count=0, seed=0) is None
    assert write_transcripts(tmp_path, 0, [], count=3, seed=0) is None
    assert list(tmp_path.iterdir()) == []
