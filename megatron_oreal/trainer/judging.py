"""Algorithm 1, line 6: answers are judged while others still generate, each on exactly one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import msgspec

from megatron_oreal.monitor.pending import waiting
from megatron_oreal.parallel.collectives import all_gather_bytes, world_rank, world_size
from megatron_oreal.types import Advance, Prompt, Rollout, RolloutGroup, Verdict
from megatron_oreal.verify.cascade import Answer, Verifier

Judged = Callable[[int, Rollout, Verdict], None]
"""Told the number of a response, the response and the verdict on it."""


class Judging:
    """The verdicts on the answers of one generation.

    An engine that streams calls `take` for each response as it comes, on one rank; what no rank has
    taken is dealt to all in `judge`.

    Attributes:
        metrics: `time/last_verdict_wait_s`, from the last response to the last verdict, and
            `throughput/judged_early_share`, of the answers that were judged before the last
            response; over all ranks, known after `judge`.
    """

    def __init__(
        self,
        verifier: Verifier,
        prompts: Sequence[Prompt],
        n_samples: int,
        *,
        known: Mapping[int, Verdict] = MappingProxyType({}),
        judged: Judged = lambda _index, _rollout, _verdict: None,
    ) -> None:
        """Expects `n_samples` responses a prompt, prompt by prompt.

        Args:
            verifier: judges.
            prompts: what was asked.
            n_samples: responses a prompt.
            known: verdicts that are there already, by response; alike on every rank.
            judged: told each other verdict as it comes, on one rank, in some thread.
        """
        self._verifier = verifier
        self._prompts = prompts
        self._n_samples = n_samples
        self._known = known
        self._judged = judged
        self._verdicts: dict[int, Future[Verdict]] = {}
        self.metrics: dict[str, float] = {}

    @property
    def longest_wait_s(self) -> float:
        """After how many seconds at the latest this rank's part of the answers is judged."""
        part = math.ceil(len(self._prompts) * self._n_samples / world_size())
        done = sum(verdict.done() for verdict in self._verdicts.values())
        return self._verifier.longest_wait_s(max(part, len(self._verdicts)) - done)

    def take(self, index: int, rollout: Rollout) -> None:
        """Begins to judge the response to a request; local to a rank, returns at once."""
        if index in self._known:
            return
        prompt = self._prompts[index // self._n_samples]
        answer = Answer(
            prompt.gold_answer,
            rollout.text,
            rollout.stopped,
            data_source=prompt.data_source,
            question=prompt.question,
        )

        def tell(verdict: Future[Verdict]) -> None:
            if not verdict.cancelled() and verdict.exception() is None:
                self._judged(index, rollout, verdict.result())

        self._verdicts[index] = self._verifier.submit(answer)
        self._verdicts[index].add_done_callback(tell)

    def judge(
        self, groups: Sequence[RolloutGroup], advance: Advance = lambda _: None
    ) -> list[RolloutGroup]:
        """Waits for all verdicts and fills them in, alike on every rank; collective over the world.

        Args:
            groups: one a prompt, the same on every rank.
            advance: told how many more answers are judged, as far as this rank can tell.
        """
        started = time.monotonic()
        early = sum(verdict.done() for verdict in self._verdicts.values())
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self._take_what_nobody_took(rollouts)
        _wait(list(self._verdicts.values()), len(rollouts), advance)
        own = {index: verdict.result() for index, verdict in self._verdicts.items()}
        waited = time.monotonic() - started
        verdicts = dict(self._known)
        waits, early_counts = [], []
        for seconds, count, share in _exchange((waited, early, own), tuple[float, int, _Share]):
            waits.append(seconds)
            early_counts.append(count)
            verdicts |= share
        self.metrics = {
            "time/last_verdict_wait_s": max(waits),
            "throughput/judged_early_share": sum(early_counts) / max(len(rollouts), 1),
        }
        in_order = (verdicts[index] for index in range(len(rollouts)))
        return [
            replace(group, verdicts=tuple(next(in_order) for _ in group.rollouts))
            for group in groups
        ]

    def _take_what_nobody_took(self, rollouts: Sequence[Rollout]) -> None:
        """Deals the answers that no engine has streamed, evenly; collective over the world.

        Neighbours, which are alike in length and difficulty, spread over the ranks.
        """
        taken = set(self._known).union(*_exchange(list(self._verdicts), list[int]))
        left = [index for index in range(len(rollouts)) if index not in taken]
        for index in left[world_rank() :: world_size()]:
            self.take(index, rollouts[index])


_Share = dict[int, Verdict]
T = TypeVar("T")


def _exchange(mine: T, kind: type[T]) -> list[T]:
    """Returns what every rank has to say, by rank; collective over the world."""
    payloads = all_gather_bytes(msgspec.msgpack.encode(mine))
    return [msgspec.msgpack.decode(payload, type=kind) for payload in payloads]


def _wait(verdicts: Sequence[Future[Verdict]], n_all: int, advance: Advance) -> None:
    """Waits for this rank's verdicts, and advances as if all ranks were as far as this one."""
    told = 0
    with waiting(lambda: f"{sum(not v.done() for v in verdicts)} of {len(verdicts)} verdicts"):
        for done, _ in enumerate(as_completed(verdicts), start=1):
            total = n_all * done // len(verdicts)
            advance(total - told)
            told = total
