"""Algorithm 1, line 6: each answer is judged on exactly one rank, the verdicts exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from megatron_oreal.parallel.collectives import all_gather_bytes, world_rank, world_size
from megatron_oreal.types import RolloutGroup, Verdict
from megatron_oreal.verify.cascade import Answer, Verifier


def judge_groups(
    verifier: Verifier,
    groups: Sequence[RolloutGroup],
    progress: Callable[[int], None] | None = None,
) -> list[RolloutGroup]:
    """Fills in the verdicts of all groups, the same on every rank; collective over the world.

    Rank r judges the answers r, r + world size, and so on: neighbours, which are alike in length
    and difficulty, spread over the ranks.
    """
    answers = [
        Answer(
            group.prompt.gold_answer,
            rollout.text,
            rollout.stopped,
            data_source=group.prompt.data_source,
            question=group.prompt.question,
        )
        for group in groups
        for rollout in group.rollouts
    ]
    mine = verifier.judge(answers[world_rank() :: world_size()], progress)
    shares = [
        msgspec.msgpack.decode(payload, type=list[Verdict])
        for payload in all_gather_bytes(msgspec.msgpack.encode(mine))
    ]
    in_order = (shares[i % world_size()][i // world_size()] for i in range(len(answers)))
    return [
        replace(group, verdicts=tuple(next(in_order) for _ in group.rollouts)) for group in groups
    ]
