"""Fixtures that unit tests of any package may want."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megatron_oreal.parallel.collectives import start_world, stop_world

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the only rank; its environment is as before when the test ends."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    start_world()
    yield
    stop_world()
