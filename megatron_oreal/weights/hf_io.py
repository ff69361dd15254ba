"""Hugging Face folders: boxes read lazily from safetensors, shards written as tensors arrive."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.hf_config import read_config_json
from megatron_oreal.weights.plan import TensorSpec, group_by_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron_oreal.weights.geometry import Box

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HfCheckpoint:
    """The tensors of a model folder, opened lazily: headers first, boxes when asked for.

    A context manager; not collective. Every refusal is a `UserError` that names the folder and
    the file or tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens every safetensors file of the folder."""
        self.folder = Path(folder)
        self._open = ExitStack()
        self._file_of: dict[str, Any] = {}
        with ExitStack() as on_failure:
            on_failure.enter_context(self._open)
            for file, expected in self._files().items():
                self._open_file(file, expected)
            on_failure.pop_all()

    def __enter__(self) -> Self:
        """Returns the open checkpoint."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self._open.close()

    def audit(self, tensors: Mapping[str, tuple[int, ...]], optional: frozenset[str]) -> None:
        """Checks that the folder holds exactly these tensors, in a supported precision.

        Args:
            tensors: Shapes by name.
            optional: Names of further tensors that may be there and are not read.

        Raises:
            UserError: A tensor is missing, left over, of another shape or precision.
        """
        missing = [name for name in tensors if name not in self._file_of]
        if missing:
            self._refuse(f"{missing[0]} is missing ({len(missing)} in all)")
        extra = sorted(self._file_of.keys() - tensors.keys() - optional)
        extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
        if extra:
            self._refuse(f"{extra[0]} is not part of such a model ({len(extra)} in all)")
        for name, shape in tensors.items():
            spec = self.spec(name)
            if spec.shape != shape:
                self._refuse(f"{name} has shape {spec.shape}, config.json asks for {shape}")

    def spec(self, name: str) -> TensorSpec:
        """Returns the shape and precision of a tensor.

        Raises:
            UserError: Its precision is not supported.
        """
        lazy = self._file_of[name].get_slice(name)
        if lazy.get_dtype() not in _DTYPES:
            self._refuse(f"{name} has dtype {lazy.get_dtype()}, not one of {', '.join(_DTYPES)}")
        return TensorSpec(name, tuple(lazy.get_shape()), _DTYPES[lazy.get_dtype()])

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Reads the elements of one box, on the CPU, in the file's precision."""
        return self._file_of[name].get_slice(name)[box.slices]

    def _files(self) -> dict[str, set[str] | None]:
        """Returns the files and, where an index says so, the tensors that each must hold."""
        index = self.folder / INDEX_FILE
        if not index.is_file():
            if not (self.folder / SINGLE_FILE).is_file():
                self._refuse(f"there is no {SINGLE_FILE} and no {INDEX_FILE}")
            return {SINGLE_FILE: None}
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            self._refuse(f"{INDEX_FILE} is not an index of safetensors ({error})")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file or Path(file).suffix != ".safetensors":
                self._refuse(f"{INDEX_FILE} names {file!r}, which is not a file of the folder")
            files[file] = (files.get(file) or set()) | {name}
        return files

    def _open_file(self, file: str, expected: set[str] | None) -> None:
        try:
            handle = self._open.enter_context(safe_open(self.folder / file, framework="pt"))
        except (OSError, SafetensorError) as error:
            self._refuse(f"cannot read {file} ({error})")
        held = set(handle.keys())
        absent = sorted((expected or set()) - held)
        if absent:
            self._refuse(f"{INDEX_FILE} names {absent[0]}, which is not in {file}")
        self._file_of |= dict.fromkeys(held if expected is None else expected, handle)

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(
            f"model.path={self.folder}: {reason}; name a folder with a whole checkpoint"
        )


class HfWriter:
    """Writes a Hugging Face folder as its tensors arrive; nothing bears its name before `finish`.

    Not collective: one rank writes. Tokenizer, generation config and `config.json` are those of
    `source`, with the precision of what is written. At most one shard is held in memory.
    """

    def __init__(
        self,
        folder: str | Path,
        source: str | Path,
        tensors: Sequence[TensorSpec],
        shard_bytes: int,
        config_changes: Mapping[str, Any] | None = None,
        *,
        prepare: bool = True,
    ) -> None:
        """Plans the shards and copies the small files; `config_changes` go into `config.json`.

        With `prepare=False` it writes shards into the folder that another rank has prepared.

        Raises:
            UserError: The folder exists already, or the source has no readable `config.json`.
            OSError: The file system refuses.
        """
        self.folder = Path(folder)
        refuse_existing(self.folder)
        self._tensors = tensors
        self.partial = partial_of(self.folder)
        self.shards = list(group_by_bytes(tensors, shard_bytes))
        self._names = _shard_names(len(self.shards))
        self._shard = 0
        self._pending: dict[str, torch.Tensor] = {}
        config_json = read_config_json(source) | dict(config_changes or {})
        key = "torch_dtype" if "torch_dtype" in config_json else "dtype"
        config_json[key] = str(tensors[0].dtype).removeprefix("torch.")
        if prepare:
            self._prepare(source, config_json)

    def _prepare(self, source: str | Path, config_json: Mapping[str, Any]) -> None:
        try:
            open_partial(self.folder)
            copy_side_files(source, self.partial)
            write_json(self.partial / "config.json", dict(config_json))
        except OSError:
            self.discard()
            raise

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes the next tensor, in the order of `tensors`, and writes the shard that it fills.

        Raises:
            ValueError: It is not the next one, or of another shape or precision than planned.
            OSError: The file system refuses.
            SafetensorError: Likewise, from within safetensors.
        """
        spec = self.shards[self._shard][len(self._pending)]
        if TensorSpec(name, tuple(tensor.shape), tensor.dtype) != spec:
            raise ValueError(f"got {name} {tuple(tensor.shape)} {tensor.dtype}, expected {spec}")
        self._pending[name] = tensor.detach().cpu().contiguous()
        if len(self._pending) == len(self.shards[self._shard]):
            self.write_shard(self._shard, self._pending)
            self._pending = {}
            self._shard += 1

    def write_shard(self, number: int, tensors: dict[str, torch.Tensor]) -> Path:
        """Writes all tensors of a shard and returns its path.

        Raises:
            OSError: The file system refuses.
            SafetensorError: Likewise, from within safetensors.
        """
        path = self.partial / self._names[number]
        save_file(tensors, path, metadata={"format": "pt"})
        sync_to_disk(path)
        return path

    def finish(self) -> None:
        """Writes the index, audits what was written and gives the folder its name.

        The audit reads every header, in which safetensors checks the byte counts of all tensors
        against the length of the file.

        Raises:
            ValueError: Tensors are missing, or what was read back is not what was planned.
            OSError: The file system refuses.
        """
        for name, shard in zip(self._names, self.shards, strict=True):
            if not (self.partial / name).exists():
                raise ValueError(f"{shard[len(self._pending)].name} never came")
        if len(self._names) > 1:
            self._write_index()
        with HfCheckpoint(self.partial) as written:
            for spec in self._tensors:
                if written.spec(spec.name) != spec:
                    raise ValueError(f"{spec.name} was written as {written.spec(spec.name)}")
            written.audit({spec.name: spec.shape for spec in self._tensors}, frozenset())
        give_name(self.folder)

    def discard(self) -> None:
        """Removes what has been written so far; for an export that failed."""
        self._pending = {}
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write_index(self) -> None:
        weight_map = {
            spec.name: name
            for name, shard in zip(self._names, self.shards, strict=True)
            for spec in shard
        }
        total = sum(spec.nbytes for spec in self._tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.partial / INDEX_FILE, index)


class _Index(msgspec.Struct):
    """The part of `model.safetensors.index.json` that matters."""

    weight_map: dict[str, str]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{shard:05d}-of-{count:05d}.safetensors" for shard in range(1, count + 1)]


def copy_side_files(source: str | Path, folder: Path) -> None:
    """Copies `config.json`, the tokenizer's files and the generation config, where there are any.

    Raises:
        OSError: The file system refuses.
    """
    for name in ("config.json", *SIDE_FILES):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
            sync_to_disk(folder / name)


def partial_of(folder: Path) -> Path:
    """Returns what a folder is called until it is whole."""
    return folder.parent / f".{folder.name}.partial"


def refuse_existing(folder: Path) -> None:
    """Raises `UserError` where the folder that is to be made is there."""
    if folder.exists():
        raise UserError(f"{folder}: it exists already; remove it or name another folder")


def open_partial(folder: Path) -> None:
    """Makes the empty folder that becomes `folder`, in place of what an interruption left.

    Raises:
        OSError: The file system refuses.
    """
    shutil.rmtree(partial_of(folder), ignore_errors=True)
    partial_of(folder).mkdir(parents=True)


def give_name(folder: Path) -> None:
    """Gives a whole folder its name and forces both to the disk.

    Raises:
        OSError: The file system refuses.
    """
    sync_to_disk(partial_of(folder))
    partial_of(folder).rename(folder)
    sync_to_disk(folder.parent)


def write_json(path: Path, content: dict[str, Any] | msgspec.Struct) -> None:
    """Writes an indented JSON file and forces it to the disk.

    Raises:
        OSError: The file system refuses.
    """
    encoded = msgspec.json.format(msgspec.json.encode(content), indent=2)
    path.write_bytes(encoded + b"\n")
    sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
