"""Saves a run and finds what to resume from; every rank does its share, and all come to the same.

Megatron's own `dist_checkpointing` is not used: torch's reader under it unpickles whatever its
`.metadata` file says, and a checkpoint may come from anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from megatron_oreal.checkpoint import folder as folders
from megatron_oreal.checkpoint.folder import Damaged, FileRecord, Manifest
from megatron_oreal.checkpoint.run_state import (
    Command,
    RunState,
    changed_versions,
    check_config,
    flat_config,
    library_versions,
)
from megatron_oreal.checkpoint.tensors import StoredModel
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.parallel.collectives import (
    agree,
    all_gather_bytes,
    broadcast_bytes,
    world_rank,
    world_size,
)
from megatron_oreal.weights.hf_io import write_json

STATE = "state.json"


class _Share(msgspec.Struct, frozen=True):
    """What one rank wrote, and how many steps its optimizers have seen."""

    files: dict[str, FileRecord]
    steps: dict[str, int]


@dataclass(frozen=True)
class Resumed:
    """A whole checkpoint, and what is to be said about it and those that were passed over."""

    folder: Path
    state: RunState
    remarks: tuple[str, ...]

    def restore(self, models: Mapping[str, StoredModel]) -> None:
        """Fills models and optimizers, which have taken no step yet; not collective.

        The checkpoint at the very start holds none: they stay what `model.path` made them.

        Raises:
            UserError: It was made by another set of models.
        """
        stored = self.state.steps
        if not stored:
            return
        if stored.keys() != models.keys():
            raise UserError(
                f"{self.folder} holds {', '.join(stored)}, this run trains {', '.join(models)}:"
                " resume with the same oreal.token_weights.kind"
            )
        audited = sorted(folders.read_manifest(self.folder).files)
        for role, model in models.items():
            names = [name for name in audited if name.startswith(f"{role}.rank_")]
            model.read([self.folder / name for name in names], stored[role])


class Checkpointer:
    """Writes the checkpoints of one run into `root`."""

    def __init__(self, config: Config, command: Command, root: Path) -> None:
        self._config, self._root = config, root
        self._command: Command = command

    def find(self) -> Resumed | None:
        """Returns the newest whole checkpoint, None where there is none; collective, the world.

        Raises:
            UserError: There are checkpoints and none is whole, or it was made with another config.
        """
        if self._config.checkpoint.resume == "never":
            return None
        listed = folders.list_iterations(self._root) if world_rank() == 0 else []
        iterations = msgspec.json.decode(broadcast_bytes(msgspec.json.encode(listed)))
        remarks = []
        for iteration in reversed(iterations):
            folder = self._root / folders.folder_name(iteration)
            problem = _audit(folder)
            if not problem:
                return self._open(folder, remarks)
            remarks.append(f"{folder} is damaged, passed over: {problem}")
        if remarks:
            raise UserError(
                f"run.folder={self._config.run.folder}: no checkpoint is whole ("
                f"{'; '.join(remarks)}); restore one, or name another folder to start anew"
            )
        return None

    def is_due(self, iteration: int, last: int) -> bool:
        """Whether to save after so many iterations of `last`."""
        every = self._config.checkpoint.every
        return every > 0 and (iteration % every == 0 or iteration == last)

    def save(
        self,
        iteration: int,
        models: Mapping[str, StoredModel],
        *,
        metrics_bytes: int,
        seconds: Mapping[str, float],
        progress: msgspec.Struct,
    ) -> Path:
        """Writes a checkpoint and removes old ones; collective over the world.

        Args:
            iteration: how many are done.
            models: what is trained, by role; none at the very start, where nothing has changed.
            metrics_bytes: length of `metrics.jsonl`, on rank 0.
            seconds: by phase, on rank 0.
            progress: what the command needs to go on.

        Raises:
            UserError: The file system refuses, on every rank alike; older checkpoints are intact.
        """
        shares = self._write_shares(iteration, models)
        with agree(), _refusals(self._root):
            if world_rank() == 0:
                state = RunState(
                    command=self._command,
                    iteration=iteration,
                    steps={role: max(s.steps[role] for s in shares) for role in models},
                    metrics_bytes=metrics_bytes,
                    seconds=dict(seconds),
                    config=flat_config(self._config),
                    versions=library_versions(),
                    progress=msgspec.Raw(msgspec.json.encode(progress)),
                )
                self._publish(state, shares)
        return self._root / folders.folder_name(iteration)

    def _write_shares(self, iteration: int, models: Mapping[str, StoredModel]) -> list[_Share]:
        """Writes this rank's files and returns every rank's report; collective over the world."""
        with agree(), _refusals(self._root):
            if world_rank() == 0:
                folders.open_partial(self._root, iteration)
        for model in models.values():
            model.plan()
        files = {}
        with agree(), _refusals(self._root):
            for role, model in models.items():
                path = folders.partial_folder(self._root, iteration) / (
                    f"{role}.rank_{world_rank():05d}.safetensors"
                )
                model.write(path)
                files[path.name] = folders.record(path)
        steps = {role: model.model.steps_taken() for role, model in models.items()}
        payloads = all_gather_bytes(msgspec.json.encode(_Share(files, steps)))
        return [msgspec.json.decode(payload, type=_Share) for payload in payloads]

    def _publish(self, state: RunState, shares: list[_Share]) -> None:
        files = {name: entry for share in shares for name, entry in share.files.items()}
        path = folders.partial_folder(self._root, state.iteration) / STATE
        write_json(path, state)
        files[STATE] = folders.record(path)
        folders.publish(self._root, state.iteration, files)
        settings = self._config.checkpoint
        folders.prune(self._root, state.iteration, settings.keep_last, settings.keep_every)

    def _open(self, folder: Path, remarks: list[str]) -> Resumed:
        state = _read_state(folder)
        check_config(self._config, state, self._command)
        changed = changed_versions(state)
        if changed:
            remarks = [*remarks, f"other versions than the checkpoint's: {', '.join(changed)}"]
        unfinished = sorted(path.name for path in self._root.glob(".iteration_*.partial"))
        remarks = [*remarks, *(f"{name} was never finished, passed over" for name in unfinished)]
        return Resumed(folder, state, tuple(remarks))


def _audit(folder: Path) -> str:
    """Returns what is wrong with a checkpoint, empty where nothing is; collective over the world.

    Each rank reads its share of the files.
    """
    problem = ""
    try:
        manifest = folders.read_manifest(folder)
        _check_parts(manifest)
        folders.audit(folder, manifest, sorted(manifest.files)[world_rank() :: world_size()])
        if world_rank() == 0:
            _read_state(folder)
    except Damaged as damage:
        problem = str(damage)
    found = [text.decode() for text in all_gather_bytes(problem.encode()) if text]
    return found[0] if found else ""


def _check_parts(manifest: Manifest) -> None:
    if STATE not in manifest.files:
        raise Damaged(f"{folders.MANIFEST} does not name {STATE}")


def _read_state(folder: Path) -> RunState:
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=RunState)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{STATE} cannot be read ({error})") from error
    if state.iteration != folders.iteration_of(folder):
        raise Damaged(f"{STATE} is of iteration {state.iteration}")
    return state


@contextlib.contextmanager
def _refusals(root: Path) -> Iterator[None]:
    """Turns what the file system refuses into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "make room or mend it, then start again: the run resumes"
        raise UserError(f"cannot save into {root} ({error}); {fix}") from error
