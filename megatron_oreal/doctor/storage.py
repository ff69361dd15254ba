"""What a run reads and where it writes: model, questions, and the disk under `run.folder`."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.sources import HUB, find_files
from megatron_oreal.doctor.report import Finding, Level
from megatron_oreal.models.registry import read_model
from megatron_oreal.planner.memory import checkpoint_bytes
from megatron_oreal.planner.sizes import parameters

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config

GIB, MIB = 1 << 30, 1 << 20
PROBE_BYTES = 64 * MIB
SLOW_MIB_PER_S = 200.0
BYTES_EXPORTED = 4  # of a parameter, at most
_AREA = "storage"


def check_inputs(config: Config) -> list[Finding]:
    """Looks whether the model's and the questions' files are there; not collective."""
    findings = []
    model = Path(config.model.path)
    try:
        family, dims = read_model(model)
        found = f"{family.name}, {parameters(dims) / 1e9:.2f}e9 parameters"
        wanted = {"*.safetensors": "weights", "tokenizer*.json": "tokenizer"}
        lacks = [what for pattern, what in wanted.items() if not any(model.glob(pattern))]
        says = f"{model} has no {' and no '.join(lacks)}: name a whole model" if lacks else ""
        level = Level.MISSING if lacks else Level.FINE
        findings.append(Finding(_AREA, "model.path", level, found, says))
    except UserError as error:
        findings.append(Finding(_AREA, "model.path", Level.MISSING, str(model), str(error)))
    files = {"data.path": config.data.path, "evaluation.path": config.evaluation.path}
    for key, path in files.items():
        if path is not None:
            findings.append(_source(key, path))
    return findings


def _source(key: str, path: str) -> Finding:
    """Looks whether the files of a source are there; what lies on a hub is not asked for."""
    try:
        files = [] if path.startswith(HUB) else find_files(path, key)
    except UserError as error:
        return Finding(_AREA, key, Level.MISSING, path, str(error))
    absent = next((file for file in files if not file.is_file()), None)
    says = f"{absent}: no such file: set {key}=..." if absent else ""
    return Finding(_AREA, key, Level.MISSING if absent else Level.FINE, path, says)


def check_folder(config: Config) -> list[Finding]:
    """Measures the disk under `run.folder` and compares its free space; not collective."""
    folder = Path(config.run.folder).resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        written, read = _speeds(there)
    except OSError as error:
        says = f"cannot be written ({error.strerror}): name another run.folder"
        return [Finding(_AREA, "run.folder", Level.MISSING, str(there), says)]
    slow = min(written, read) < SLOW_MIB_PER_S
    says = "slow: checkpoints of billions of parameters will take minutes" if slow else ""
    speed = f"writes {written:.0f}, reads {read:.0f} MiB/s"
    level = Level.NOTE if slow else Level.FINE
    return [Finding(_AREA, "run.folder", level, speed, says), _space(config, there)]


def _speeds(folder: Path) -> tuple[float, float]:
    """Returns MiB/s of writing a file to the disk and of reading it, maybe from the page cache."""
    content = os.urandom(MIB)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(PROBE_BYTES // MIB):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(MIB):
            pass
        return PROBE_BYTES / MIB / written, PROBE_BYTES / MIB / (time.perf_counter() - started)


def _space(config: Config, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.0f} GiB free"
    try:
        _, dims = read_model(config.model.path)
    except UserError:
        return Finding(_AREA, "space", Level.FINE, found)
    kept = config.checkpoint.keep_last + 1  # the oldest goes once a new one is whole
    need = checkpoint_bytes(config, dims) * kept + BYTES_EXPORTED * parameters(dims)
    says = f"a run of it needs about {need / GIB:.0f} GiB"
    level = Level.FINE if free > need else Level.MISSING
    return Finding(_AREA, "space", level, found, says)
