"""Checkpoints of a toy policy on test ranks: saved, looked for, restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.checkpoint.checkpointer import Checkpointer
from megatron_oreal.checkpoint.tensors import StoredModel
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import OptimizerConfig
from megatron_oreal.engine.roles import Policy
from megatron_oreal.trainer.models import ModelSource
from megatron_oreal.trainer.resume import SftProgress
from tests.toy_models import (
    make_config,
    make_policy,
    make_trajectories,
    open_models,
    pack,
    whole_weights,
)

Who = Callable[[], contextlib.AbstractContextManager[None]]
LEARNING_RATE = 1e-3
# Adam's eps stands above the rounding of a gradient, which layouts differ by.
ADAM = OptimizerConfig(lr=LEARNING_RATE, eps=1e-5)
# The negative term of Eq. 11 adds no more to a loss than its parts; these add up to one sign.
SFT = objectives.sft_objective(sum(t.response_length for t in make_trajectories()))


def open_checkpointer(folder: Path, root: Path) -> tuple[Checkpointer, ModelSource, Policy]:
    """A toy policy that can step, and what saves it."""
    source = open_models(make_config(folder, optimizer=ADAM))
    return Checkpointer(source.config, "train", root), source, make_policy(source)


def begin(checkpointer: Checkpointer, done: int, models: dict[str, StoredModel]) -> None:
    """Copies what is to be saved and begins to write it."""
    outcome = checkpointer.save(done, models, metrics_bytes=0, seconds={}, progress=SftProgress(""))
    assert outcome is None, outcome


def save_whole(checkpointer: Checkpointer, done: int, models: dict[str, StoredModel]) -> str:
    """Saves and waits for the disk; what went wrong, empty where nothing did."""
    begin(checkpointer, done, models)
    outcome = checkpointer.settle()
    assert outcome is not None
    return outcome.problem


def save_twice(folder: Path, root: Path) -> list[dict[str, torch.Tensor]]:
    """Saves after each of two steps; the weights then."""
    checkpointer, source, policy = open_checkpointer(folder, root)
    models, weights = {"policy": source.stored(policy.model)}, []
    for done in (1, 2):
        policy.step(pack(make_trajectories()), SFT, LEARNING_RATE)
        assert save_whole(checkpointer, done, models) == ""
        weights.append(whole_weights(source, policy))
    return weights


class Found(NamedTuple):
    """What a rank resumed from, and the weights it has then."""

    folder: str
    remarks: tuple[str, ...]
    steps: dict[str, int]
    weights: dict[str, torch.Tensor]


def find(folder: Path, root: Path, who: Who = contextlib.nullcontext) -> Found:
    """Resumes a policy that has taken no step; `who` looks for the checkpoint."""
    checkpointer, source, policy = open_checkpointer(folder, root)
    with who():
        found = checkpointer.find()
    assert found is not None
    found.restore({"policy": source.stored(policy.model)})
    weights = whole_weights(source, policy)
    return Found(found.folder.name, found.remarks, found.state.steps, weights)


def find_or_refuse(folder: Path, root: Path, who: Who = contextlib.nullcontext) -> Found | str:
    """Likewise, or the refusal's text."""
    try:
        return find(folder, root, who)
    except UserError as error:
        return str(error)
