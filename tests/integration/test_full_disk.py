"""A run whose disk of 50 MB fills up goes on, and has lost nothing once there is room again."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import toy
from tests.integration.commands import COMMAND, started

START_S, FULL_S, END_S = 200.0, 6.0, 200.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def lines_of(metrics: Path) -> list[str]:
    return metrics.read_text().splitlines() if metrics.exists() else []


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in (65536, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(piece))


@pytest.mark.slow
def test_fine_tuning_goes_on(root: Path, disk: Path) -> None:
    more = {"run__folder": disk / "sft", "engine__tokens_per_micro_batch": 1024}
    settings = toy.settings(root, "sft", checkpoint__every=2, **more)
    metrics = disk / "sft" / "metrics.jsonl"
    with started([sys.executable, *COMMAND, "sft", *settings]) as process:
        deadline = time.monotonic() + START_S
        while len(lines_of(metrics)) < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        fill(disk / "filler")
        time.sleep(FULL_S)
        assert process.poll() is None, process.communicate()[1]
        (disk / "filler").unlink()
        stdout, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 0, stderr
    assert "is not written (" in stdout
    assert "No space left on device" in stdout
    assert [json.loads(line)["iteration"] for line in lines_of(metrics)] == list(range(42))
    newest = sorted(path.name for path in (disk / "sft" / "checkpoints").iterdir())
    assert newest == ["iteration_000040", "iteration_000042"]
