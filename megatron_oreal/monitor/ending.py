"""How a run that cannot go on is told: words for the console, from what is known of each rank."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from megatron_oreal.monitor.whereabouts import Whereabouts

_NAMED = 8  # ranks, then their number


def late(
    everyone: Sequence[Whereabouts], ranks: int, answered: Collection[int], now: float
) -> list[str]:
    """Names the ranks that the others wait for, one text each, as far as this can be told; pure.

    Those that never came; else those with fewer changes of phase than the others; else those that
    do not answer; else those with fewer exchanges; else those that wait for nothing while others
    do.

    Args:
        everyone: what is known, by rank; a rank that never came is absent.
        ranks: of the world.
        answered: ranks that have reported since they were asked to.
        now: seconds since 1970.
    """
    known = {where.rank for where in everyone}
    never = [f"rank {rank} (never began)" for rank in range(ranks) if rank not in known]
    furthest = max((where.step for where in everyone), default=0)
    silent = [where for where in everyone if where.rank not in answered]
    talkative = [where for where in everyone if where.rank in answered]
    most = max((where.collectives for where in talkative), default=0)
    waits = any(where.pending for where in talkative)
    found = (
        [where for where in everyone if where.step < furthest]
        or silent
        or [where for where in talkative if where.collectives < most]
        or [where for where in talkative if waits and not where.pending]
    )
    return never + [_words(where, where.rank in answered, now) for where in found]


def listed(names: Sequence[str]) -> str:
    """Returns names in one text, the first of many and their number."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def header(where: Whereabouts) -> str:
    """Returns what stands above the stacks of a rank."""
    since = time.strftime("%F %T", time.gmtime(where.since))
    return (
        f"rank {where.rank}, pid {where.pid} on {where.host}: {where.place} since {since} UTC\n"
        f"waits for: {where.pending or 'nothing that it announced'}\n"
        f"{where.step} changes of phase, {where.collectives} exchanges so far\n\n"
    )


def _words(where: Whereabouts, answers: bool, now: float) -> str:
    silence = "" if answers else ", does not answer: stopped, or held by C code"
    return f"rank {where.rank} ({where.place} for {now - where.since:.0f} s{silence})"
