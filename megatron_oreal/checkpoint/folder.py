"""A checkpoint on the disk: written beside its place, audited, renamed; which of them are whole.

`checkpoints/iteration_000010/` holds files and `manifest.json`, the size and SHA-256 of each. A
folder of that name whose files are as the manifest says is whole; no other is ever read. While one
is being written its name is `.iteration_000010.partial`; `.old` ends the name of one that is being
replaced, `.removed` of one that is being removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from megatron_oreal.weights.hf_io import sync_to_disk, write_json

MANIFEST, STATE, FORMAT = "manifest.json", "state.json", 2
_NAME = re.compile(r"iteration_(\d{6,})")
_FILE = re.compile(r"state\.json|[a-z_]+\.rank_\d{5,}\.safetensors")


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


def tensor_file(role: str, rank: int) -> str:
    """Returns the name of what a rank writes of a model."""
    return f"{role}.rank_{rank:05d}.safetensors"


def iteration_of(folder: Path) -> int | None:
    """Returns after how many iterations a checkpoint was taken; None where it is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_iterations(root: Path) -> list[int]:
    """Returns the checkpoints that bear their name, whole or not, in order."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted(i for folder in folders if (i := iteration_of(folder)) is not None)


def record(path: Path) -> FileRecord:
    """Forces a file to the disk and returns what can be read of it there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        # What is in memory is what was written: the disk itself is to be asked.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(file.fileno()).st_size
        return FileRecord(size, hashlib.file_digest(file, "sha256").hexdigest())


def open_partial(root: Path, iteration: int) -> Path:
    """Makes an empty folder to write into; removes what interrupted saves left."""
    for suffix in ("partial", "old", "removed"):
        for stale in root.glob(f".iteration_*.{suffix}"):
            _delete(stale)
    folder = partial_folder(root, iteration)
    folder.mkdir(parents=True)
    return folder


def discard_partial(root: Path, iteration: int) -> None:
    """Removes what a failed save has written so far, as far as the file system lets it."""
    shutil.rmtree(partial_folder(root, iteration), ignore_errors=True)


def recover(root: Path) -> None:
    """Gives its name back to a checkpoint whose replacement was interrupted."""
    for old in root.glob(".iteration_*.old"):
        target = root / old.name.removeprefix(".").removesuffix(".old")
        if not os.path.lexists(target):
            old.rename(target)


def publish(root: Path, iteration: int, files: Mapping[str, FileRecord]) -> None:
    """Gives a written folder its manifest and its name.

    What bears the name already goes: the same checkpoint, or one that a resumed run passed over.

    Raises:
        OSError: The file system refuses, or does not show a file as long as it was written.
    """
    folder, target = partial_folder(root, iteration), root / folder_name(iteration)
    for name, expected in files.items():
        if (folder / name).stat().st_size != expected.bytes:
            raise OSError(f"{folder / name} is not as long as it was written")
    write_json(folder / MANIFEST, Manifest(FORMAT, dict(files)))
    sync_to_disk(folder)
    old = root / f".{target.name}.old"
    if os.path.lexists(target):
        target.rename(old)
    folder.rename(target)
    sync_to_disk(root)
    if os.path.lexists(old):
        _delete(old)


def prune(root: Path, newest: int, keep_last: int, keep_every: int) -> None:
    """Removes old checkpoints, and those beyond `newest`, which a resumed run has passed over."""
    there = list_iterations(root)
    kept = [i for i in there if i <= newest][-keep_last:]
    kept += [i for i in there if keep_every and 0 < i <= newest and i % keep_every == 0]
    for iteration in set(there) - set(kept):
        name = folder_name(iteration)
        # Renamed first: half a folder must not bear the name of a checkpoint.
        _delete((root / name).rename(root / f".{name}.removed"))


def read_manifest(folder: Path) -> Manifest:
    """Reads what a checkpoint must hold.

    Raises:
        Damaged: There is no manifest, or none that can be trusted.
    """
    try:
        check_plain(folder / MANIFEST)
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is malformed ({error})") from error
    if manifest.format != FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest.format}, this version reads {FORMAT}")
    for name in manifest.files:
        if not _FILE.fullmatch(name):
            raise Damaged(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
    if STATE not in manifest.files:
        raise Damaged(f"{MANIFEST} does not name {STATE}")
    return manifest


def check_plain(path: Path) -> None:
    """Checks that a file is one: neither a link to somewhere else nor a pipe, which never ends.

    Raises:
        Damaged: It is not.
        OSError: There is nothing, or it may not be seen.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise Damaged(f"{path.name} is no plain file")


def check_extra(folder: Path, manifest: Manifest) -> None:
    """Checks that the folder holds no tensors but those of the manifest.

    Raises:
        Damaged: It does: two checkpoints have been mixed.
    """
    there = {path.name for path in folder.glob("*.safetensors")}
    extra = sorted(there - manifest.files.keys())
    if extra:
        raise Damaged(f"{extra[0]} is not in {MANIFEST}")


def audit(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """Compares these files with the manifest.

    Raises:
        Damaged: One is missing or not what was written; names it.
    """
    for name in names:
        expected = manifest.files[name]
        try:
            check_plain(folder / name)
            size = (folder / name).stat().st_size
            if size != expected.bytes:
                raise Damaged(f"{name} has {size} bytes of {expected.bytes}")
            if record(folder / name) != expected:
                raise Damaged(f"{name} has changed since it was written")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error


def _delete(path: Path) -> None:
    """Removes a folder, or whatever else has taken its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
