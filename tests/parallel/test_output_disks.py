"""Outputs that a disk or a kill cuts short: one line on every rank, nothing that looks complete."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.weights.convert import Rate, convert_to_hf, convert_to_megatron
from megatron_oreal.weights.sharded import open_store
from tests.ranks import RankError, RankPools
from tests.toy_models import make_config, make_policy, open_models, write_toy

pytestmark = pytest.mark.parallel

KIB = 1 << 10
Write = Callable[..., None]


def quiet(_: str) -> None:
    """Says nothing of how far it is."""


def die(_: str) -> None:
    """Ends the process once the first file is written, without any cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut(source: Path, out: Path, say: Callable[[str], None] = quiet) -> None:
    convert_to_megatron(source, out, ParallelConfig(tensor=2), rate=Rate(say))


def join(source: Path, out: Path, say: Callable[[str], None] = quiet) -> None:
    convert_to_hf(source, out, shard_bytes=16 * KIB, rate=Rate(say))


def export(source: Path, out: Path) -> None:
    opened = open_models(make_config(source))
    opened.export(make_policy(opened), out, replace=False)


def refused(write: Write, source: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        write(source, out)
    return str(caught.value)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of ten pages: enough for the small files and some of the weights."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("write", [cut, join, export])
def test_a_full_and_a_read_only_disk(
    ranks: RankPools, tmp_path: Path, disk: Path, write: Write
) -> None:
    source = write_toy(tmp_path / "hf", "qwen2")

    def refusal() -> str:
        found = ranks(2).run(refused, write, source, disk / "out", tp=2)
        assert found == [found[0]] * 2
        assert str(disk / "out") in found[0]
        assert "\n" not in found[0]
        return found[0]

    assert "No space left on device" in refusal()
    assert list(disk.iterdir()) == []
    (disk / "filler").write_bytes(bytes(40 * KIB))
    assert "No space left on device" in refusal()
    (disk / "filler").unlink()
    assert list(disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "Read-only file system" in refusal()


@pytest.mark.parametrize("write", [cut, join])
def test_a_killed_conversion_looks_like_nothing_and_may_be_done_again(
    ranks: RankPools, tmp_path: Path, write: Write
) -> None:
    source, out = write_toy(tmp_path / "hf", "qwen2"), tmp_path / "out"
    with pytest.raises(RankError, match="exit code -9"):
        ranks(1).run(write, source, out, die)
    assert not out.exists()
    with pytest.raises(UserError, match=r"there is no|cannot read"):
        open_store(tmp_path / ".out.partial")
    ranks(1).run(write, source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
