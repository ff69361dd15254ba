"""Saves a run and finds what to resume from; every rank does its share, and all come to the same.

Megatron's own `dist_checkpointing` is not used: torch's reader under it unpickles whatever its
`.metadata` file says, and a checkpoint may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_oreal.checkpoint import folder as folders
from megatron_oreal.checkpoint.folder import STATE, Damaged
from megatron_oreal.checkpoint.run_state import (
    Command,
    RunState,
    changed_settings,
    changed_versions,
    check_config,
    config_hash,
    flat_config,
    library_versions,
)
from megatron_oreal.checkpoint.saving import Outcome, Saving, attempt
from megatron_oreal.checkpoint.snapshot import audit_tensors
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
        for role, model in models.items():
            names = [folders.tensor_file(role, rank) for rank in range(self.state.ranks)]
            model.read([self.folder / name for name in names], stored[role])


class Checkpointer:
    """Writes the checkpoints of one run into `root`, one at a time."""

    def __init__(self, config: Config, command: Command, root: Path) -> None:
        self._config, self._root = config, root
        self._command: Command = command
        self._saving: Saving | None = None
        self._failed = False

    def find(self) -> Resumed | None:
        """Returns the newest whole checkpoint, None where there is none; collective, the world.

        Raises:
            UserError: There are checkpoints and none is whole, or it was made with another config.
        """
        if self._config.checkpoint.resume == "never":
            return None
        remarks = []
        for iteration in reversed(self._listed()):
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
        """Whether to save after so many iterations of `last`: also when the last save failed."""
        every = self._config.checkpoint.every
        return every > 0 and (iteration % every == 0 or iteration == last or self._failed)

    def save(
        self,
        iteration: int,
        models: Mapping[str, StoredModel],
        *,
        metrics_bytes: int,
        seconds: Mapping[str, float],
        progress: msgspec.Struct,
        wandb_id: str = "",
    ) -> Outcome | None:
        """Begins a checkpoint, the one before being settled; collective over the world.

        All that it will hold has been copied when the call returns.

        Args:
            iteration: how many are done.
            models: what is trained, by role; none at the very start, where nothing has changed.
            metrics_bytes: length of `metrics.jsonl`, on rank 0.
            seconds: by phase, on rank 0.
            progress: what the command needs to go on.
            wandb_id: of the run in wandb, on rank 0; empty without one.

        Returns:
            What went wrong before anything was written, None where it is being written.
        """
        assert self._saving is None, "one checkpoint at a time"
        flat = flat_config(self._config)
        state = RunState(
            command=self._command,
            iteration=iteration,
            ranks=world_size(),
            steps={},
            metrics_bytes=metrics_bytes,
            seconds=dict(seconds),
            config=flat,
            config_hash=config_hash(flat),
            versions=library_versions(),
            wandb_id=wandb_id,
            progress=msgspec.Raw(msgspec.json.encode(progress)),
        )
        problem = attempt(lambda: self._open_partial(iteration))
        if problem:
            return self._settled(Outcome(iteration, problem, 0.0))
        for model in models.values():
            model.prepare()
        copies = {role: model.snapshot() for role, model in models.items()}
        self._saving = Saving(self._root, state, copies, self._config.checkpoint)
        return None

    def advance(self) -> Outcome | None:
        """Returns what became of the checkpoint that is being written, once that is known.

        To be called at the end of every iteration. Collective over the world while there is one.
        """
        return self._settled(self._saving.advance()) if self._saving else None

    def settle(self) -> Outcome | None:
        """Likewise, and waits for it."""
        return self._settled(self._saving.settle()) if self._saving else None

    def _settled(self, outcome: Outcome | None) -> Outcome | None:
        if outcome:
            self._saving, self._failed = None, bool(outcome.problem)
        return outcome

    def _open_partial(self, iteration: int) -> None:
        if world_rank() == 0:
            folders.open_partial(self._root, iteration)

    def _listed(self) -> list[int]:
        """Returns the checkpoints that bear their name; collective over the world."""
        listed: list[int] = []
        with agree():
            if world_rank() == 0:
                try:
                    folders.recover(self._root)
                    listed = folders.list_iterations(self._root)
                except OSError as error:
                    fix = "make it readable, or name another folder to start anew"
                    raise UserError(f"{self._root}: {error.strerror}; {fix}") from error
        return msgspec.json.decode(broadcast_bytes(msgspec.json.encode(listed)), type=list[int])

    def _open(self, folder: Path, remarks: list[str]) -> Resumed:
        state = _read_state(folder)
        check_config(self._config, state, self._command)
        changed = changed_versions(state)
        if changed:
            remarks = [*remarks, f"other versions than the checkpoint's: {', '.join(changed)}"]
        settings = changed_settings(self._config, state)
        if settings:
            remarks = [*remarks, f"other settings than the checkpoint's: {', '.join(settings)}"]
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
        folders.check_extra(folder, manifest)
        names = sorted(manifest.files)[world_rank() :: world_size()]
        folders.audit(folder, manifest, names)
        for name in names:
            if name != STATE:
                audit_tensors(folder / name)
        if world_rank() == 0:
            _check_parts(_read_state(folder), manifest.files.keys())
    except Damaged as damage:
        problem = str(damage)
    found = [text.decode() for text in all_gather_bytes(problem.encode()) if text]
    return found[0] if found else ""


def _check_parts(state: RunState, names: Set[str]) -> None:
    """Checks that every rank's tensors of every model are there."""
    expected = {folders.tensor_file(role, r) for role in state.steps for r in range(state.ranks)}
    missing = sorted(expected - names)
    if missing:
        raise Damaged(f"{folders.MANIFEST} does not name {missing[0]}")


def _read_state(folder: Path) -> RunState:
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=RunState)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"{STATE} cannot be read ({error})") from error
    if state.iteration != folders.iteration_of(folder):
        raise Damaged(f"{STATE} is of iteration {state.iteration}")
    if state.config_hash != config_hash(state.config):
        raise Damaged(f"{STATE} has another config than its config_hash says")
    return state
