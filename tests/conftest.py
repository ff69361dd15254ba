"""Fixtures that every folder of tests shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.ranks import RankPools

if TYPE_CHECKING:
    from collections.abc import Iterator


# A property says what is true, not how fast: a busy machine must not fail it.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks(n).run(fn, *args, tp=, pp=, cp=)` runs a module-level `fn` on n warm ranks."""
    pools = RankPools()
    yield pools
    pools.close()
