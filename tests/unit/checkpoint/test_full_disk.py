"""A full disk costs what it cannot take, and says so; a real one of 50 MB."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_oreal.checkpoint import folder as folders
from megatron_oreal.checkpoint.snapshot import NotFinite, Snapshot
from megatron_oreal.monitor.sinks import JsonlSink, Sinks
from tests.unit.checkpoint.test_checkpointer import Note, make, save, try_to_save

MIB = 1 << 20
SIZE_MIB = 50


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 50 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leaves no byte; returns the file that takes them."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB) if file.tell() < (SIZE_MIB - 1) * MIB else bytes(4096))
    return filler


@pytest.mark.usefixtures("world_of_one")
def test_a_checkpoint_that_finds_no_room_is_tried_again(disk: Path) -> None:
    whole = save(disk, 5)
    filler = fill(disk)
    assert "No space left on device" in try_to_save(disk, 10).problem
    assert folders.list_iterations(disk) == [5]
    found = make(disk).find()
    assert found is not None
    assert (found.folder, found.remarks) == (whole, ())
    filler.unlink()
    save(disk, 11)
    assert folders.list_iterations(disk) == [5, 11]
    assert sorted(path.name for path in disk.iterdir()) == ["iteration_000005", "iteration_000011"]


def test_a_copy_larger_than_the_disk_leaves_its_error(disk: Path) -> None:
    snapshot = Snapshot({"weight/a/0": torch.ones(16 * MIB)}, 1)
    with pytest.raises(Exception, match="No space left on device"):
        snapshot.write(disk / "policy.rank_00000.safetensors", "iteration_000001")


def test_lines_that_find_no_room_are_written_later(disk: Path) -> None:
    said: list[str] = []
    sink = JsonlSink(disk / "metrics.jsonl")
    sinks = Sinks([sink], said.append)
    sinks.write(0, {"a": 1.0})
    filler = fill(disk)
    # More than what is left of the file's page.
    sinks.write(1, {f"metric/{i}": float(i) for i in range(1000)})
    length = sinks.metrics_bytes
    assert len(said) == 1
    assert said[0].startswith("alarm: metrics of iteration 1 are not written yet (")
    assert "No space left on device" in said[0]
    assert (disk / "metrics.jsonl").read_text().count("\n") == 1
    filler.unlink()
    sinks.write(2, {"a": 2.0})
    sinks.close()
    content = (disk / "metrics.jsonl").read_bytes()
    assert [json.loads(line)["iteration"] for line in content.splitlines()] == [0, 1, 2]
    assert content[:length].endswith(b"\n")
    assert len(said) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_never_reach_the_disk(tmp_path: Path, number: float) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = number
    with pytest.raises(NotFinite, match=r"^weight/a/0,0 holds a number that is not finite$"):
        Snapshot({"weight/a/0,0": values}, 1).write(tmp_path / "policy", "iteration_000001")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("world_of_one")
def test_after_a_failure_the_next_iteration_saves(disk: Path) -> None:
    checkpointer = make(disk, "checkpoint.every=5")
    filler = fill(disk)
    assert checkpointer.is_due(5, last=20)
    note = Note("")
    outcome = checkpointer.save(5, {}, metrics_bytes=0, seconds={}, progress=note)
    outcome = outcome or checkpointer.settle()
    assert outcome is not None
    assert outcome.problem
    assert checkpointer.is_due(6, last=20)
    filler.unlink()
    again = checkpointer.save(6, {}, metrics_bytes=0, seconds={}, progress=note)
    again = again or checkpointer.settle()
    assert again is not None
    assert not again.problem
    assert not checkpointer.is_due(7, last=20)
