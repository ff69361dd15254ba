"""A seeded sample of each iteration's rollouts, whole: what the policy really writes.

Two files an iteration. `iter_000012.jsonl` has one rollout a line, to be read and searched by a
person; `iter_000012.npz` has under the line's number, from 0, its tokens: one record of
`TOKEN_DTYPE` a response token. Differences are stored rather than the values themselves, so that
half precision keeps what is small.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write, atomic_write_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from megatron_oreal.types import PackedBatch, RolloutGroup

# (index of the group, index of the sample in it)
Place = tuple[int, int]

# Everything but the first two is known of tokens trained on alone, and NaN elsewhere.
TOKEN_DTYPE = np.dtype(
    [
        ("token", "<i4"),
        ("rollout_logprob", "<f2"),  # the engine's, raw
        ("mismatch", "<f2"),  # policy logprob - rollout logprob
        ("reference_difference", "<f2"),  # reference logprob - policy logprob
        ("entropy", "<f2"),  # of the policy's distribution, nats
        ("token_score", "<f2"),  # s_t; q_t is the sigmoid of its running mean
        ("token_weight", "<f2"),
    ]
)
_LEVEL = 1  # of compression: half-precision numbers hardly shrink, and an iteration waits


def write_transcripts(
    folder: Path,
    iteration: int,
    groups: Sequence[RolloutGroup],
    *,
    count: int,
    seed: int,
    batch: PackedBatch | None = None,
) -> Path | None:
    """Writes `folder/iter_000012.jsonl` and `.npz` and returns the path of the first.

    On one rank only, not collective. The `.npz` comes first: a line never lacks its tokens.

    Args:
        folder: of the run's transcripts.
        iteration: 0-based; with `seed` it fixes the sample.
        groups: all groups of the iteration, judged or not.
        count: rollouts to write; none writes no file.
        seed: of the run.
        batch: the trajectories trained on. Half of the sample is drawn from them, one question
            after the other, so that a question's correct and incorrect answer stand side by side.
    """
    trained = {} if batch is None else _trained(batch)
    places = _draw(groups, trained, count, random.Random(f"transcripts {seed} {iteration}"))
    if not places:
        return None
    tokens = [_tokens(groups[g], k, batch, trained) for g, k in places]
    lines = [
        _record(iteration, groups[g], k, of_line, trained)
        for (g, k), of_line in zip(places, tokens, strict=True)
    ]
    path = transcript_path(folder, iteration)
    atomic_write(path.with_suffix(".npz"), (_archive(tokens),))
    atomic_write_text(path, "".join(f"{to_json(line)}\n" for line in lines))
    return path


def transcript_path(folder: Path, iteration: int) -> Path:
    """Returns where the lines of an iteration's transcripts are."""
    return folder / f"iter_{iteration:06d}.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of an `iter_000012.jsonl`, each with its `line` number from 0.

    Raises:
        ValueError: A line is no JSON object.
    """
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: holds a line that is no object")
    return [{**record, "line": number} for number, record in enumerate(records)]


def read_tokens(path: Path, lines: Iterable[int]) -> dict[int, np.ndarray]:
    """Reads the tokens of some lines of an `iter_000012.jsonl`: `[n]` of `TOKEN_DTYPE` each.

    Lines without any, as of a run that wrote none, are left out.
    """
    archive = path.with_suffix(".npz")
    if not archive.exists():
        return {}
    with np.load(archive, allow_pickle=False) as stored:
        known = {line: stored[str(line)] for line in lines if str(line) in stored.files}
    return {line: tokens for line, tokens in known.items() if tokens.dtype == TOKEN_DTYPE}


def running_q(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the running means m_t of token scores, and q_t = sigmoid(m_t): `[n]`, float64."""
    means = np.cumsum(scores.astype(np.float64)) / np.arange(1, len(scores) + 1)
    return means, 1 / (1 + np.exp(-means))


def _draw(
    groups: Sequence[RolloutGroup], trained: dict[Any, int], count: int, rng: random.Random
) -> list[Place]:
    places = [(g, k) for g, group in enumerate(groups) for k in range(len(group.rollouts))]
    of_question: dict[int, list[Place]] = defaultdict(list)
    for g, k in places:
        if _key(groups[g], k) in trained:
            of_question[g].append((g, k))
    questions = rng.sample(list(of_question.values()), len(of_question))
    drawn = [place for question in questions for place in question][: count // 2]
    rest = [place for place in places if place not in set(drawn)]
    return sorted(drawn + rng.sample(rest, min(count - len(drawn), len(rest))))


def _trained(batch: PackedBatch) -> dict[Any, int]:
    """Returns where each trajectory is in the batch, by question and response tokens."""
    return {
        (trajectory.prompt_id, trajectory.tokens[trajectory.prompt_length :]): i
        for i, trajectory in enumerate(batch.trajectories)
    }


def _key(group: RolloutGroup, k: int) -> tuple[str, tuple[int, ...]]:
    return group.prompt.id, group.rollouts[k].tokens


def _tokens(
    group: RolloutGroup, k: int, batch: PackedBatch | None, trained: dict[Any, int]
) -> np.ndarray:
    """Returns what is known of each response token, `[n]` of `TOKEN_DTYPE`."""
    rollout = group.rollouts[k]
    tokens = np.empty(len(rollout.tokens), TOKEN_DTYPE)
    for name in TOKEN_DTYPE.names or ():
        tokens[name] = np.nan if name != "token" else rollout.tokens
    place = trained.get(_key(group, k))
    fields: dict[str, np.ndarray] = {}
    if batch is not None and place is not None:
        fields = {name: values[place].numpy() for name, values in batch.fields.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # not finite is a finding, not a mistake
        tokens["rollout_logprob"] = rollout.logprobs
        for name in ("entropy", "token_score", "token_weight"):
            if name in fields:
                tokens[name] = fields[name]
        if "logprobs" in fields:
            tokens["mismatch"] = fields["logprobs"] - np.asarray(rollout.logprobs)
        if {"logprobs", "reference_logprobs"} <= fields.keys():
            tokens["reference_difference"] = fields["reference_logprobs"] - fields["logprobs"]
    return tokens


def _archive(arrays: Sequence[np.ndarray]) -> bytes:
    """Returns what `numpy.savez_compressed` would write, by a faster level of compression."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as archive:
        for number, array in enumerate(arrays):
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            archive.writestr(f"{number}.npy", member.getbuffer())
    return file.getvalue()


def _record(
    iteration: int, group: RolloutGroup, k: int, tokens: np.ndarray, trained: dict[Any, int]
) -> dict[str, Any]:
    prompt, rollout = group.prompt, group.rollouts[k]
    verdict = group.verdicts[k] if group.verdicts else None
    score = float(tokens["token_score"].astype(np.float64).mean()) if len(tokens) else np.nan
    return {
        "iteration": iteration,
        "prompt_id": prompt.id,
        "sample": k,
        "prompt": prompt.question,
        "gold_answer": prompt.gold_answer,
        "response": rollout.text,
        "response_length": len(rollout.tokens),
        "stopped": rollout.stopped,
        "pass_rate": group.pass_rate,
        "reward": group.rewards[k] if group.rewards else None,
        "advantage": group.advantages[k] if group.advantages else None,
        "outcome": verdict.outcome if verdict else None,
        "decided_by": verdict.by if verdict else None,
        "reason": verdict.reason if verdict else None,
        "extracted": verdict.extracted if verdict else None,
        "verify_s": verdict.seconds if verdict else None,
        "trained": _key(group, k) in trained,
        "score": None if np.isnan(score) else score,
    }
