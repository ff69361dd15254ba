"""A rank's way through its phases, as its peers see it; what ends a run is in `integration`."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema_health import WatchdogConfig
from megatron_oreal.monitor.watchdog import Watchdog, key_of
from megatron_oreal.monitor.whereabouts import read_all


def place(folder: Path) -> tuple[str, int | None, int]:
    (where,) = read_all(folder, 1)
    return where.phase, where.iteration, where.step


def test_every_change_of_phase_is_written(tmp_path: Path) -> None:
    before = threading.active_count()
    with closing(Watchdog(tmp_path, 0, 1, WatchdogConfig())) as watchdog:
        assert place(tmp_path) == ("between", None, 1)
        with watchdog.phase("start"):
            assert place(tmp_path) == ("start", None, 2)
        watchdog.begin(0)
        with watchdog.phase("evaluate"):
            with watchdog.phase("generate"):
                assert place(tmp_path) == ("generate", 0, 6)
            assert place(tmp_path) == ("evaluate", 0, 7)
        assert place(tmp_path) == ("between", 0, 8)
    watchdog.close()
    assert place(tmp_path) == ("ended", 0, 9)
    assert threading.active_count() == before
    left = {"rank_00000.json", "rank_00000.stacks.txt"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_an_error_leaves_the_phase(tmp_path: Path) -> None:
    with closing(Watchdog(tmp_path, 0, 1, WatchdogConfig())) as watchdog:
        for kind in (OSError, UserError):  # of the only rank: they go their way
            with pytest.raises(kind), watchdog.first_error_only(), watchdog.phase("checkpoint"):
                raise kind("no room")
            assert place(tmp_path)[0] == "between"


def test_a_disk_that_refuses_costs_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    with closing(Watchdog(folder, 0, 1, WatchdogConfig())) as watchdog:
        moved = folder.rename(tmp_path / "elsewhere")
        for name in ("generate", "policy"):
            with watchdog.phase(name):
                pass
        moved.rename(folder)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"megatron-oreal: {folder} cannot be written: ")


@pytest.mark.parametrize(
    ("phase", "key"),
    [("generate", "generate_s"), ("export", "save_s"), ("policy", "train_s"), ("x", "train_s")],
)
def test_every_phase_has_a_deadline(phase: str, key: str) -> None:
    assert key_of(phase) == key


def test_exchanges_fail_later_than_every_deadline() -> None:
    assert WatchdogConfig().timeout_s == 15000.0
    assert WatchdogConfig(sync_s=0).timeout_s == 30 * 24 * 3600.0
