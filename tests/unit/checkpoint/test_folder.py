"""Checkpoints are written whole and under one name, old ones are removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_oreal.checkpoint import folder as folders


def write(root: Path, iteration: int) -> Path:
    partial = folders.open_partial(root, iteration)
    for name in ("policy.rank_00000.safetensors", "state.json"):
        (partial / name).write_bytes(name.encode() * 10)
    files = {path.name: folders.record(path) for path in partial.iterdir()}
    folders.publish(root, iteration, files)
    return root / folders.folder_name(iteration)


def check(folder: Path) -> None:
    manifest = folders.read_manifest(folder)
    folders.audit(folder, manifest, sorted(manifest.files))


def test_what_was_published_is_whole_and_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "new", 10)
    check(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["iteration_000010"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "policy.rank_00000.safetensors", "state.json"]


def test_a_new_write_removes_what_an_interrupted_one_left(tmp_path: Path) -> None:
    (folders.open_partial(tmp_path, 5) / "half").touch()
    assert folders.list_iterations(tmp_path) == []
    folder = write(tmp_path, 10)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_write_replaces_a_folder_of_its_name(tmp_path: Path) -> None:
    (write(tmp_path, 10) / "state.json").unlink()
    check(write(tmp_path, 10))
    assert [path.name for path in tmp_path.iterdir()] == ["iteration_000010"]


@pytest.mark.parametrize("left", ["a file", "a link"])
def test_a_write_replaces_whatever_bears_its_name(tmp_path: Path, left: str) -> None:
    elsewhere = write(tmp_path / "elsewhere", 5)
    name = tmp_path / "iteration_000010"
    name.touch() if left == "a file" else name.symlink_to(elsewhere)
    check(write(tmp_path, 10))
    check(elsewhere)


def test_a_replacement_that_was_interrupted_is_taken_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    old = folder.rename(tmp_path / ".iteration_000010.old")
    folders.recover(tmp_path)
    check(folder)
    assert not old.exists()
    old.mkdir()
    folders.recover(tmp_path)
    check(folder)
    folders.open_partial(tmp_path, 15)
    assert not old.exists()


@pytest.mark.parametrize(
    ("newest", "keep_last", "keep_every", "kept"),
    [
        (25, 2, 0, [20, 25]),
        (25, 1, 10, [10, 20, 25]),
        (15, 2, 0, [10, 15]),  # 20 and 25 are beyond what the run resumed from
        (25, 9, 0, [0, 5, 10, 15, 20, 25]),
    ],
)
def test_old_ones_are_removed(
    tmp_path: Path, newest: int, keep_last: int, keep_every: int, kept: list[int]
) -> None:
    for iteration in range(0, 30, 5):
        write(tmp_path, iteration)
    folders.prune(tmp_path, newest, keep_last, keep_every)
    assert folders.list_iterations(tmp_path) == kept


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    assert folders.list_iterations(tmp_path / "absent") == []
    for name in ("iteration_5", "iteration_000005.bak", "notes"):
        (tmp_path / name).mkdir()
    assert folders.list_iterations(tmp_path) == []
