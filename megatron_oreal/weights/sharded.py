"""Weights as the ranks of a Megatron layout hold them, in files that any other layout can read.

A folder holds `rank-*.safetensors`, one a rank, whose entries are boxes of Hugging Face tensors,
`<name>/<where the box begins>`; a manifest that says which; `config.json` and the tokenizer's
files. Every element is in it once: what ranks hold in copies is shared out among them.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from megatron_oreal.config.errors import UserError
from megatron_oreal.weights.geometry import Box, check_cover
from megatron_oreal.weights.hf_io import HfCheckpoint
from megatron_oreal.weights.plan import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MANIFEST = "manifest.json"


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and precision of a Hugging Face tensor."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16"]


class StoredBox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A box of a tensor that a file holds."""

    tensor: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def entry(self) -> str:
        """Its name in the file."""
        return entry_of(self.tensor, self.start)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder holds, cut for `tensor` x `pipeline` ranks."""

    tensor: int
    pipeline: int
    tensors: dict[str, StoredTensor]
    files: dict[str, list[StoredBox]]
    version: Literal[1] = 1


class Piece(NamedTuple):
    """A box of a tensor as an entry of an open safetensors file."""

    box: Box
    file: Any
    entry: str


def entry_of(tensor: str, start: Sequence[int]) -> str:
    """Returns the name of the entry that holds a tensor's box which begins there."""
    return f"{tensor}/{','.join(map(str, start))}"


def read_box(pieces: Iterable[Piece], box: Box, dtype: torch.dtype) -> torch.Tensor:
    """Returns the elements of one box, on the CPU, put together from disjoint pieces.

    Raises:
        ValueError: The pieces lack a part of it.
    """
    origin = (0,) * len(box.start)
    values, read = torch.empty(box.shape, dtype=dtype), 0
    for piece in pieces:
        common = piece.box.intersect(box)
        if common is not None:
            part = piece.file.get_slice(piece.entry)[common.moved(piece.box.start, origin).slices]
            values[common.moved(box.start, origin).slices] = part
            read += common.size
    if read != box.size:
        raise ValueError(f"the files have {read} of {box.size} values")
    return values


class ShardedCheckpoint:
    """The tensors of such a folder, opened lazily; reads any box, whatever files it lies in.

    A context manager; not collective. Every refusal is a `UserError` that names the folder and the
    file or tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the manifest and opens every file that it names."""
        self.folder = Path(folder)
        self._open = ExitStack()
        self._pieces: defaultdict[str, list[Piece]] = defaultdict(list)
        try:
            self.manifest = msgspec.json.decode(
                (self.folder / MANIFEST).read_bytes(), type=Manifest
            )
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            self._refuse(f"cannot read {MANIFEST} ({error})")
        with ExitStack() as on_failure:
            on_failure.enter_context(self._open)
            for file, boxes in self.manifest.files.items():
                self._open_file(file, boxes)
            on_failure.pop_all()

    def __enter__(self) -> Self:
        """Returns the open checkpoint."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self._open.close()

    def audit(
        self, tensors: Mapping[str, tuple[int, ...]], optional: frozenset[str] = frozenset()
    ) -> None:
        """Checks that the folder holds exactly these tensors, each element of them once.

        Raises:
            UserError: A tensor is missing, left over, of another shape, or has a gap.
        """
        stored = self.manifest.tensors
        missing = [name for name in tensors if name not in stored]
        if missing:
            self._refuse(f"{missing[0]} is missing ({len(missing)} in all)")
        extra = sorted((stored.keys() | self._pieces.keys()) - tensors.keys() - optional)
        if extra:
            self._refuse(f"{extra[0]} is not part of such a model ({len(extra)} in all)")
        for name, shape in tensors.items():
            if stored[name].shape != shape:
                self._refuse(f"{name} has shape {stored[name].shape}, config.json asks for {shape}")
            try:
                check_cover(name, [piece.box for piece in self._pieces[name]], Box.whole(shape))
            except ValueError as error:
                self._refuse(str(error))

    def spec(self, name: str) -> TensorSpec:
        """Returns the shape and precision of a tensor."""
        stored = self.manifest.tensors[name]
        return TensorSpec(name, stored.shape, getattr(torch, stored.dtype))

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Reads the elements of one box, on the CPU, in the files' precision."""
        return read_box(self._pieces[name], box, self.spec(name).dtype)

    def _open_file(self, name: str, boxes: list[StoredBox]) -> None:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            self._refuse(f"{MANIFEST} names {name!r}, which is not a file of the folder")
        try:
            file = self._open.enter_context(safe_open(self.folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            self._refuse(f"cannot read {name} ({error})")
        entries = set(file.keys())
        for stored in boxes:
            if stored.entry not in entries or stored.tensor not in self.manifest.tensors:
                self._refuse(f"{MANIFEST} names {stored.entry}, which is not in {name}")
            self._check_entry(name, stored, file.get_slice(stored.entry))
            box = Box(stored.start, stored.stop)
            self._pieces[stored.tensor].append(Piece(box, file, stored.entry))

    def _check_entry(self, file: str, stored: StoredBox, lazy: Any) -> None:
        tensor = self.manifest.tensors[stored.tensor]
        shape = [high - low for low, high in zip(stored.start, stored.stop, strict=False)]
        is_box = 0 < len(stored.start) == len(stored.stop) == len(tensor.shape)
        is_box = is_box and min(stored.start) >= 0 and min(shape) > 0
        dtype = _SHORT[tensor.dtype]
        if not is_box or lazy.get_shape() != shape or lazy.get_dtype() != dtype:
            self._refuse(
                f"{stored.entry} in {file} is {lazy.get_dtype()} {lazy.get_shape()}, {MANIFEST} "
                f"says {dtype} {list(stored.start)} to {list(stored.stop)}"
            )

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(
            f"weights in {self.folder}: {reason}; name a folder with a whole checkpoint"
        )


_SHORT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Store = HfCheckpoint | ShardedCheckpoint


def open_store(folder: str | Path) -> Store:
    """Opens a folder of weights of either kind; a context manager.

    Raises:
        UserError: It holds no readable weights.
    """
    if (Path(folder) / MANIFEST).is_file():
        return ShardedCheckpoint(folder)
    return HfCheckpoint(folder)
