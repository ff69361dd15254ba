"""Which questions an iteration asks: seeded epochs, hard questions more often, resumable."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.types import Prompt

PASS_RATE_BOUNDS = (0.2, 0.4, 0.6, 0.8)
COPIES_BETWEEN_BOUNDS = (6, 4, 4, 2, 0)


def copies(pass_rate: float | None) -> int:
    """Returns how often an epoch asks a question of this pass rate; once where it is unknown."""
    return (
        1 if pass_rate is None else COPIES_BETWEEN_BOUNDS[bisect_right(PASS_RATE_BOUNDS, pass_rate)]
    )


class PromptSampler:
    """Deals questions in batches, alike on every rank: a function of questions and seed alone.

    An epoch is a seeded shuffle of every copy of every question. A batch draws no question twice
    while there is one it has not drawn: a second copy waits for the next batch, also over the turn
    of an epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, balance_by_pass_rate: bool) -> None:
        """Starts before the first question of the first epoch.

        Raises:
            UserError: Balancing drops every question.
        """
        self._prompts = prompts
        self._seed = seed
        self._copies = [
            copies(prompt.pass_rate) if balance_by_pass_rate else 1 for prompt in prompts
        ]
        self._distinct = sum(count > 0 for count in self._copies)
        if not self._distinct:
            raise UserError(
                "data.balance_by_pass_rate=true drops every question of data.path (all pass rates"
                f" are {PASS_RATE_BOUNDS[-1]} or more): set it to false or bring harder questions"
            )
        self._deferred: list[int] = []
        self._start_epoch(0)

    def next_batch(self, n: int) -> list[Prompt]:
        """Returns the next `n` questions; all different where the data has `n` different ones."""
        batch: list[int] = []
        drawn: set[int] = set()
        waiting, self._deferred = self._deferred, []
        while len(batch) < n:
            if len(drawn) == self._distinct:
                drawn.clear()
                waiting, self._deferred = [*waiting, *self._deferred], []
            index = waiting.pop(0) if waiting else self._draw()
            if index in drawn:
                self._defer(index)
            else:
                drawn.add(index)
                batch.append(index)
        self._deferred += waiting
        return [self._prompts[index] for index in batch]

    def state(self) -> dict[str, Any]:
        """Returns where the sampler stands, as plain JSON values."""
        return {
            "fingerprint": self._fingerprint(),
            "epoch": self._epoch,
            "position": self._position,
            "deferred": list(self._deferred),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            UserError: It was taken over other questions, pass rates or another seed.
        """
        if state["fingerprint"] != self._fingerprint():
            raise UserError(
                "data.path, data.balance_by_pass_rate or run.seed differ from those of the"
                " checkpoint: resume with the same, or start a new run.folder"
            )
        self._start_epoch(state["epoch"])
        self._position = state["position"]
        self._deferred = list(state["deferred"])

    def _start_epoch(self, epoch: int) -> None:
        order = [index for index, count in enumerate(self._copies) for _ in range(count)]
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        self._epoch, self._order, self._position = epoch, order, 0

    def _draw(self) -> int:
        if self._position == len(self._order):
            self._start_epoch(self._epoch + 1)
        self._position += 1
        return self._order[self._position - 1]

    def _defer(self, index: int) -> None:
        # Where a batch takes much of an epoch, copies would pile up faster than they are dealt.
        if self._deferred.count(index) < self._copies[index]:
            self._deferred.append(index)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._seed}".encode())
        for prompt, count in zip(self._prompts, self._copies, strict=True):
            digest.update(f"\n{count} {prompt.id!r} {prompt.tokens}".encode())
        return digest.hexdigest()
