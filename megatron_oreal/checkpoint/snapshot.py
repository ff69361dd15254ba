"""A copy in host memory of what a rank saves of a model, and the file that it becomes.

Nothing here touches live tensors or talks to other ranks, so that it may run in a thread while the
model is trained. safetensors, hashing and torch let go of the interpreter's lock meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_oreal.checkpoint.folder import Damaged, FileRecord, record

_OF = "of"


class NotFinite(Exception):  # noqa: N818  a state of what is to be saved, which the caller reports
    """A tensor holds a number that is not finite; the text names it."""


@dataclass(frozen=True)
class Snapshot:
    """The boxes that a rank writes, by entry, and how many steps its optimizer had taken."""

    tensors: Mapping[str, torch.Tensor]
    steps: int

    def write(self, path: Path, checkpoint: str) -> FileRecord:
        """Writes a file of the checkpoint of that name and reads it back.

        Raises:
            NotFinite: A number is not; nothing is written.
            OSError: The file system refuses, or does not give back what was written.
            SafetensorError: Likewise, from within safetensors.
        """
        for entry, values in self.tensors.items():
            _check_finite(entry, values)
        save_file(dict(self.tensors), path, metadata={_OF: f"{checkpoint}/{path.name}"})
        written = record(path)
        with safe_open(path, framework="pt") as file:
            for entry, values in self.tensors.items():
                if not torch.equal(file.get_tensor(entry), values):
                    raise OSError(f"{path} does not hold what was written")
        return written


def audit_tensors(path: Path) -> None:
    """Checks that a file was written into this place, and that its numbers are finite.

    Raises:
        Damaged: It is not.
    """
    try:
        with safe_open(path, framework="pt") as file:
            written_as = (file.metadata() or {}).get(_OF)
            if written_as != f"{path.parent.name}/{path.name}":
                raise Damaged(f"{path.name} was written as {written_as}")
            for entry in file.keys():  # noqa: SIM118  no dict
                _check_finite(entry, file.get_tensor(entry))
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from error
    except NotFinite as error:
        raise Damaged(f"{path.name}: {error}") from error


def _check_finite(entry: str, values: torch.Tensor) -> None:
    # One pass and no memory: a number that is not finite is the least or the largest.
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(values)):
        raise NotFinite(f"{entry} holds a number that is not finite")
