"""Twenty kinds of damage and more: each is named, and none loads anything but what was saved."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oreal.checkpoint.folder import record
from tests.checkpoints import find_or_refuse, save_twice
from tests.ranks import RankPools
from tests.toy_models import write_model

pytestmark = pytest.mark.parallel

FIRST, NEWEST = "iteration_000001", "iteration_000002"
SHARD, OTHER_SHARD = "policy.rank_00000.safetensors", "policy.rank_00001.safetensors"
CAPABILITY_VERSION = 0x20080522
READS_EVERYTHING = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
Damage = Callable[[Path], object]
"""Damages the newest checkpoint, given its folder."""


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap(a: Path, b: Path) -> None:
    a.rename(a.parent / "aside")
    b.rename(a)
    (a.parent / "aside").rename(b)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def forge(folder: Path) -> None:
    """Makes the manifest right again, as somebody would who knows the format."""
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    files = {name: msgspec.to_builtins(record(folder / name)) for name in names}
    edit(folder / "manifest.json", lambda manifest: manifest.update(files=files))


def in_state(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        edit(folder / "state.json", change)
        forge(folder)

    return damage


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: edit(folder / "manifest.json", change)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


def without_forged(folder: Path) -> None:
    (folder / OTHER_SHARD).unlink()
    forge(folder)


def older_shard_forged(folder: Path) -> None:
    shutil.copyfile(folder.parent / FIRST / SHARD, folder / SHARD)
    forge(folder)


def swapped_forged(folder: Path) -> None:
    swap(folder / SHARD, folder / OTHER_SHARD)
    forge(folder)


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / SHARD, metadata={"of": f"{NEWEST}/{SHARD}"})
    forge(folder)


def a_file_for_a_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def a_link_to_the_first(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / FIRST)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def as_partial(folder: Path) -> None:
    folder.rename(folder.parent / f".{folder.name}.partial")


PASSED_OVER: dict[str, tuple[Damage, str]] = {
    "truncated shard": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]),
        f"{SHARD} has .* bytes of",
    ),
    "shard of no bytes": (lambda f: (f / SHARD).write_bytes(b""), f"{SHARD} has 0 bytes of"),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD}: No such file"),
    "flipped bit of the data": (lambda f: flip(f / SHARD, -1), f"{SHARD} has changed"),
    "flipped bit of the header": (lambda f: flip(f / SHARD, 20), f"{SHARD} has changed"),
    "swapped shards": (
        lambda f: swap(f / SHARD, f / OTHER_SHARD),
        "policy.rank_.*(bytes of|changed)",
    ),
    "swapped shards, manifest forged": (swapped_forged, f"was written as {NEWEST}/{OTHER_SHARD}"),
    "shard of another checkpoint": (
        lambda f: shutil.copyfile(f.parent / FIRST / SHARD, f / SHARD),
        f"{SHARD} has changed",
    ),
    "shard of another checkpoint, manifest forged": (
        older_shard_forged,
        f"{SHARD} was written as {FIRST}/{SHARD}",
    ),
    "missing shard, manifest forged": (without_forged, f"does not name {OTHER_SHARD}"),
    "extra shard": (
        lambda f: shutil.copyfile(f / SHARD, f / "policy.rank_00002.safetensors"),
        "policy.rank_00002.safetensors is not in manifest.json",
    ),
    "a number that is not finite": (not_a_number, f"{SHARD}: .* not finite"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:99]),
        "manifest.json is malformed",
    ),
    "manifest of another checkpoint": (
        lambda f: shutil.copyfile(f.parent / FIRST / "manifest.json", f / "manifest.json"),
        "(bytes of|has changed)",
    ),
    "manifest of another format": (
        in_manifest(lambda m: m.update(format=99)),
        "format 99, this version reads",
    ),
    "path out of the folder": (
        in_manifest(lambda m: m["files"].update({"../x.safetensors": m["files"][SHARD]})),
        "which is no file of a checkpoint",
    ),
    "NaN for a size": (
        in_manifest(lambda m: m["files"][SHARD].update(bytes=float("nan"))),
        "manifest.json is malformed",
    ),
    "no state": (lambda f: (f / "state.json").unlink(), "state.json: No such file"),
    "state that is no JSON": (
        lambda f: ((f / "state.json").write_bytes(b"\xff{"), forge(f)),
        "state.json cannot be read",
    ),
    "state of wrong types": (in_state(lambda s: s.update(steps=[1])), "state.json cannot be read"),
    "state of another iteration": (in_state(lambda s: s.update(iteration=1)), "is of iteration 1"),
    "config that was edited": (
        in_state(lambda s: s["config"].update({"run.seed": 5})),
        "another config than its config_hash",
    ),
    "empty folder": (emptied, "manifest.json: No such file"),
    "file instead of the folder": (a_file_for_a_folder, "manifest.json: Not a directory"),
    "link to another checkpoint": (a_link_to_the_first, "state.json is of iteration 1|written as"),
    "link instead of a shard": (lambda f: replace_by_link(f / SHARD), f"{SHARD} is no plain file"),
    "pipe instead of a shard": (lambda f: replace_by_pipe(f / SHARD), f"{SHARD} is no plain file"),
    "folder instead of a shard": (
        lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()),
        f"{SHARD} is no plain file",
    ),
}


@dataclass(frozen=True)
class Saved:
    """A run's checkpoints after one step and after two, and its weights then."""

    model: Path
    root: Path
    weights: list[dict[str, torch.Tensor]]

    def copy(self, to: Path) -> Path:
        """A copy of the checkpoints; the newest one's folder."""
        shutil.copytree(self.root, to)
        return to / NEWEST


@pytest.fixture(scope="module")
def saved(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("damage")
    model, root = write_model(folder / "hf", tied=False), folder / "checkpoints"
    return Saved(model, root, ranks(2).run(save_twice, model, root)[0])


def assert_weights(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("damage", "named"), PASSED_OVER.values(), ids=list(PASSED_OVER))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    ranks: RankPools, saved: Saved, tmp_path: Path, damage: Damage, named: str
) -> None:
    newest = saved.copy(tmp_path / "root")
    damage(newest)
    for found in ranks(2).run(find_or_refuse, saved.model, newest.parent):
        assert not isinstance(found, str), found
        assert found.folder == FIRST
        assert_weights(found.weights, saved.weights[0])
        (remark,) = found.remarks
        assert remark.startswith(f"{newest} is damaged, passed over: ")
        assert re.search(named, remark), remark


def test_a_folder_that_was_never_finished_is_named(
    ranks: RankPools, saved: Saved, tmp_path: Path
) -> None:
    newest = saved.copy(tmp_path / "root")
    as_partial(newest)
    found = ranks(2).run(find_or_refuse, saved.model, newest.parent)[0]
    assert found.remarks == (f".{NEWEST}.partial was never finished, passed over",)
    assert_weights(found.weights, saved.weights[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update(command="sft"), "its checkpoints are of `sft`"),
        (lambda s: s["config"].update({"run.seed": 5}), "run.seed=0: the run was started with 5"),
    ],
    ids=["of another command", "of another run"],
)
def test_a_whole_checkpoint_of_something_else_is_refused(
    ranks: RankPools,
    saved: Saved,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    named: str,
) -> None:
    def rewrite(state: dict[str, Any]) -> None:
        change(state)
        encoded = msgspec.json.encode(state["config"], order="sorted")
        state["config_hash"] = hashlib.sha256(encoded).hexdigest()

    newest = saved.copy(tmp_path / "root")
    in_state(rewrite)(newest)
    refusals = ranks(2).run(find_or_refuse, saved.model, newest.parent)
    assert all(isinstance(text, str) and named in text for text in refusals), refusals


class Capabilities(ctypes.Structure):
    """What a thread may do beyond what files say, of capabilities(7); a half of it in each set."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextlib.contextmanager
def obeying_permissions() -> Iterator[None]:
    """Whoever may read everything may read what its files say, wherever they lie."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, halves = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (Capabilities * 2)()

    def call(function: Callable[..., int]) -> None:
        if function(header, halves) != 0:
            raise OSError(ctypes.get_errno(), f"{function.__name__} of capabilities")

    call(libc.capget)
    before = halves[0].effective
    halves[0].effective = before & ~READS_EVERYTHING
    call(libc.capset)
    try:
        yield
    finally:
        halves[0].effective = before
        call(libc.capset)


def find_by_permission(model: Path, root: Path) -> Any:
    return find_or_refuse(model, root, obeying_permissions)


@pytest.mark.parametrize("closed", ["a shard", "the folder", "all checkpoints"])
def test_what_may_not_be_read_is_named(ranks: RankPools, saved: Saved, closed: str) -> None:
    root = saved.root.parent / closed.replace(" ", "-")
    newest = saved.copy(root)
    for path in root.glob("*/*"):
        path.chmod(0o644)
    target = {"a shard": newest / SHARD, "the folder": newest, "all checkpoints": root}[closed]
    target.chmod(0)
    for found in ranks(2).run(find_by_permission, saved.model, root):
        if closed == "all checkpoints":
            assert "Permission denied" in found
            continue
        assert found.folder == FIRST
        assert_weights(found.weights, saved.weights[0])
        assert "Permission denied" in found.remarks[0]
