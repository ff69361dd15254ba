"""Whole checkpoints are found, damaged ones named, old ones removed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_oreal.checkpoint import folder as folders
from megatron_oreal.checkpoint.folder import Damaged


def write(root: Path, iteration: int) -> Path:
    partial = folders.open_partial(root, iteration)
    for name in ("a.safetensors", "state.json"):
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
    assert names == ["a.safetensors", "manifest.json", "state.json"]


def truncate(folder: Path) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "a.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(folder: Path, key: str, value: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


ELSEWHERE = {"../a.safetensors": {"bytes": 1, "sha256": ""}}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "a.safetensors has 129 bytes of 130"),
    "a bit flipped": (flip, "a.safetensors has changed"),
    "a file is missing": (lambda f: (f / "state.json").unlink(), "state.json: No such file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"fi'), "malformed"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b'{"format": "\xff"}'), "malformed"),
    "files are no mapping": (lambda f: change(f, "files", 3), "malformed"),
    "of a newer version": (lambda f: change(f, "format", 2), "format 2, this version reads 1"),
    "reaches elsewhere": (lambda f: change(f, "files", ELSEWHERE), "no file of the folder"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], text: str) -> None:
    folder = write(tmp_path, 10)
    damage(folder)
    with pytest.raises(Damaged, match=text):
        check(folder)


def test_a_new_write_removes_what_an_interrupted_one_left(tmp_path: Path) -> None:
    (folders.open_partial(tmp_path, 5) / "half").touch()
    assert folders.list_iterations(tmp_path) == []
    folder = write(tmp_path, 10)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_write_replaces_a_folder_of_its_name(tmp_path: Path) -> None:
    truncate(write(tmp_path, 10))
    check(write(tmp_path, 10))


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
