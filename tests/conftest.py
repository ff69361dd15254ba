"""Fixtures that every folder of tests shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ranks import RankPools

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks(n).run(fn, *args, tp=, pp=, cp=)` runs a module-level `fn` on n warm ranks."""
    pools = RankPools()
    yield pools
    pools.close()
