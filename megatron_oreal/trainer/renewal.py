"""What a run does where a rollout server has died: says so, waits, sends the weights anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from megatron_oreal.rollout.engine import Renew
from megatron_oreal.rollout.weight_sync import WeightSync
from megatron_oreal.trainer.journal import Journal


def renewal(journal: Journal, sync: WeightSync) -> Renew:
    """Returns what an engine is told to renew its weights by; see `rollout.engine.Renew`."""

    @contextlib.contextmanager
    def renew(why: str) -> Iterator[Callable[[], None]]:
        journal.say(f"{why}; waiting for the servers, to send them the policy's weights")
        with journal.phase("sync"):
            yield lambda: sync.push(check=True)
        journal.say("the servers have the policy's weights; what has no answer is asked again")

    return renew
