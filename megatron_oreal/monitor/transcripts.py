"""A seeded sample of each iteration's rollouts, whole: what the policy really writes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from megatron_oreal.types import PackedBatch, RolloutGroup

# (index of the group, index of the sample in it)
Place = tuple[int, int]


def write_transcripts(
    folder: Path,
    iteration: int,
    groups: Sequence[RolloutGroup],
    *,
    count: int,
    seed: int,
    batch: PackedBatch | None = None,
) -> Path | None:
    """Writes `folder/iter_000012.jsonl`, one rollout a line, and returns its path.

    On one rank only, not collective.

    Args:
        folder: of the run's transcripts.
        iteration: 0-based; with `seed` it fixes the sample.
        groups: all groups of the iteration, judged or not.
        count: rollouts to write; none writes no file.
        seed: of the run.
        batch: the trajectories trained on. Half of the sample is drawn from them, and their lines
            hold the batch's fields under `per_token`, one value a response token.
    """
    trained = {} if batch is None else _trained(batch)
    places = _draw(groups, trained, count, random.Random(f"transcripts {seed} {iteration}"))
    if not places:
        return None
    lines = [_record(iteration, groups[g], k, trained) for g, k in places]
    path = folder / f"iter_{iteration:06d}.jsonl"
    atomic_write_text(path, "".join(f"{to_json(line)}\n" for line in lines))
    return path


def _draw(
    groups: Sequence[RolloutGroup], trained: dict[Any, Any], count: int, rng: random.Random
) -> list[Place]:
    places = [(g, k) for g, group in enumerate(groups) for k in range(len(group.rollouts))]
    favoured = [(g, k) for g, k in places if _key(groups[g], k) in trained]
    drawn = rng.sample(favoured, min(count // 2, len(favoured)))
    rest = [place for place in places if place not in set(drawn)]
    return sorted(drawn + rng.sample(rest, min(count - len(drawn), len(rest))))


def _trained(batch: PackedBatch) -> dict[Any, dict[str, list[float]]]:
    """Returns the per-token fields of each trajectory, by question and response tokens."""
    return {
        (trajectory.prompt_id, trajectory.tokens[trajectory.prompt_length :]): {
            name: values[i].tolist() for name, values in batch.fields.items()
        }
        for i, trajectory in enumerate(batch.trajectories)
    }


def _key(group: RolloutGroup, k: int) -> tuple[str, tuple[int, ...]]:
    return group.prompt.id, group.rollouts[k].tokens


def _record(
    iteration: int, group: RolloutGroup, k: int, trained: dict[Any, dict[str, list[float]]]
) -> dict[str, Any]:
    prompt, rollout, key = group.prompt, group.rollouts[k], _key(group, k)
    verdict = group.verdicts[k] if group.verdicts else None
    return {
        "iteration": iteration,
        "prompt_id": prompt.id,
        "sample": k,
        "prompt": prompt.question,
        "gold_answer": prompt.gold_answer,
        "response": rollout.text,
        "stopped": rollout.stopped,
        "tokens": rollout.tokens,
        "logprobs": rollout.logprobs,
        "pass_rate": group.pass_rate,
        "reward": group.rewards[k] if group.rewards else None,
        "advantage": group.advantages[k] if group.advantages else None,
        "outcome": verdict.outcome if verdict else None,
        "decided_by": verdict.by if verdict else None,
        "reason": verdict.reason if verdict else None,
        "extracted": verdict.extracted if verdict else None,
        "verify_s": verdict.seconds if verdict else None,
        "trained": key in trained,
        "per_token": trained.get(key, {}),
    }
