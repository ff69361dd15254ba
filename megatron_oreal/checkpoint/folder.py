"""A checkpoint on the disk: written beside its place, audited, renamed; which of them are whole.

`checkpoints/iteration_000010/` holds files and `manifest.json`, the size and SHA-256 of each. A
folder of that name whose files are as the manifest says is whole; no other is ever read. While one
is being written its name is `.iteration_000010.partial`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from megatron_oreal.weights.hf_io import sync_to_disk, write_json

MANIFEST, FORMAT = "manifest.json", 1
_NAME = re.compile(r"iteration_(\d{6,})")


class FileRecord(msgspec.Struct, frozen=True):
    """What a file must be."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """Every other file of a checkpoint, by name."""

    format: int
    files: dict[str, FileRecord]


class Damaged(Exception):  # noqa: N818  a state of a checkpoint, which the caller passes over
    """A checkpoint is not whole; the text says why."""


def folder_name(iteration: int) -> str:
    """Returns the name of the checkpoint after so many iterations."""
    return f"iteration_{iteration:06d}"


def partial_folder(root: Path, iteration: int) -> Path:
    """Returns where the checkpoint is while it is being written."""
    return root / f".{folder_name(iteration)}.partial"


def iteration_of(folder: Path) -> int | None:
    """Returns after how many iterations a checkpoint was taken; None where it is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_iterations(root: Path) -> list[int]:
    """Returns the checkpoints that bear their name, whole or not, in order."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted(i for folder in folders if (i := iteration_of(folder)) is not None)


def record(path: Path) -> FileRecord:
    """Forces a file to the disk and returns what it is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def open_partial(root: Path, iteration: int) -> Path:
    """Makes an empty folder to write into; removes those that interrupted saves left."""
    for stale in root.glob(".iteration_*.partial"):
        shutil.rmtree(stale)
    folder = partial_folder(root, iteration)
    folder.mkdir(parents=True)
    return folder


def publish(root: Path, iteration: int, files: Mapping[str, FileRecord]) -> None:
    """Gives a written folder its manifest and its name.

    A folder that bears the name already is one that a resumed run passed over, and goes.

    Raises:
        OSError: The file system refuses, or does not show a file as long as it was written.
    """
    folder, target = partial_folder(root, iteration), root / folder_name(iteration)
    for name, expected in files.items():
        if (folder / name).stat().st_size != expected.bytes:
            raise OSError(f"{folder / name} is not as long as it was written")
    write_json(folder / MANIFEST, Manifest(FORMAT, dict(files)))
    sync_to_disk(folder)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    sync_to_disk(root)


def prune(root: Path, newest: int, keep_last: int, keep_every: int) -> None:
    """Removes old checkpoints, and those beyond `newest`, which a resumed run has passed over."""
    there = list_iterations(root)
    kept = [i for i in there if i <= newest][-keep_last:]
    kept += [i for i in there if keep_every and 0 < i <= newest and i % keep_every == 0]
    for iteration in set(there) - set(kept):
        shutil.rmtree(root / folder_name(iteration))


def read_manifest(folder: Path) -> Manifest:
    """Reads what a checkpoint must hold.

    Raises:
        Damaged: There is no manifest, or none that can be trusted.
    """
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(f"{MANIFEST} is malformed ({error})") from error
    if manifest.format != FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest.format}, this version reads {FORMAT}")
    for name in manifest.files:
        if Path(name).name != name:
            raise Damaged(f"{MANIFEST} names {name!r}, which is no file of the folder")
    return manifest


def audit(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """Compares these files with the manifest.

    Raises:
        Damaged: One is missing or not what was written; names it.
    """
    for name in names:
        expected = manifest.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != expected.bytes:
                raise Damaged(f"{name} has {size} bytes of {expected.bytes}")
            if record(folder / name) != expected:
                raise Damaged(f"{name} has changed since it was written")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
