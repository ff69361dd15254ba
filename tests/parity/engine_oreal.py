"""The cases through the loop of a run, its real models on real ranks, and what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import torch

from megatron_oreal.config.schema import (
    CheckpointConfig,
    Config,
    MonitorConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from megatron_oreal.data.sampler import PromptSampler
from megatron_oreal.engine.roles import (
    Policy,
    PolicyStep,
    Reference,
    TokenRewardModel,
    TokenRewardStep,
)
from megatron_oreal.monitor.metrics import read_metrics
from megatron_oreal.parallel.collectives import broadcast_bytes, world_rank
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.loop import OrealLoop
from megatron_oreal.trainer.models import ModelSource
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.rates import Rates
from megatron_oreal.trainer.run_alarms import RunAlarms
from megatron_oreal.trainer.skipped_steps import SkippedSteps
from megatron_oreal.types import PackedBatch, Prompt, RolloutGroup
from megatron_oreal.weights.bridge import open_stream
from tests.parity.cases import Case, make_groups
from tests.toy_models import (
    ROOMY,
    VOCAB,
    make_config,
    make_policy,
    make_reference,
    make_token_rm,
    open_models,
)

SNUG = 48  # tokens a micro-batch: a few trajectories
# A step that moves nothing, so that one model serves all cases, and never clips its gradient.
LR = 1e-30
STILL = OptimizerConfig(lr=LR, min_lr=0.0, clip_grad=1e30)
SCORES = 6.0  # times the drawn head: token scores of +-3, so that weights are far from equal
Tensors = dict[str, torch.Tensor]


class Seen(NamedTuple):
    """Metrics of the iteration, and the summed gradients by the names of Hugging Face tensors."""

    metrics: dict[str, float]
    policy_loss: float
    token_rm_loss: float
    policy_gradients: Tensors
    token_rm_gradients: Tensors


class Witness(Journal):
    """The journal of a run that also keeps the losses as the engine added them up."""

    policy_loss = token_rm_loss = math.nan

    def policy(self, batch: PackedBatch, step: PolicyStep, rate: float) -> None:
        """See `Journal.policy`."""
        self.policy_loss = step.loss
        super().policy(batch, step, rate)

    def token_rm(self, batch: PackedBatch, step: TokenRewardStep, rate: float) -> None:
        """See `Journal.token_rm`."""
        self.token_rm_loss = step.loss
        super().token_rm(batch, step, rate)


@dataclass(frozen=True)
class HandedGroups:
    """Answers with what it was given."""

    groups: list[RolloutGroup]

    def answer(self, prompts: Sequence[Prompt], iteration: int) -> list[RolloutGroup]:  # noqa: ARG002
        """See `GroupSource.answer`."""
        return self.groups

    def keep(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """See `GroupSource.keep`."""


@dataclass(frozen=True)
class Models:
    """The models of all cases on this rank; `token_rms` by position of the score."""

    source: ModelSource
    policy: Policy
    reference: Reference
    token_rms: dict[str, TokenRewardModel]


def see_all(folder: Path, runs: Path, cases: Sequence[Case]) -> list[Seen]:
    """Runs each case through one iteration of the loop; collective over the world."""
    models = _open(folder)
    return [_see(models, runs / str(case.index), case) for case in cases]


def scalar_head(token_rm: TokenRewardModel) -> torch.Tensor:
    """The weight `[1, h]` of the token reward model's head, where this rank has it."""
    return token_rm.model.parameters()["output_layer.weight"]


def _open(folder: Path) -> Models:
    config = make_config(folder / "policy", distributed_optimizer=False, optimizer=STILL)
    source = open_models(config)
    token_rms = {}
    for position in ("before", "at"):
        oreal = replace(config.oreal, token_score=position)
        token_rms[position] = make_token_rm(open_models(replace(config, oreal=oreal)))
        if source.topology.is_last_stage:
            scalar_head(token_rms[position]).mul_(SCORES)
    reference = make_reference(open_models(make_config(folder / "reference")))
    return Models(source, make_policy(source), reference, token_rms)


def _see(models: Models, folder: Path, case: Case) -> Seen:
    groups = make_groups(case, VOCAB)
    config = replace(
        models.source.config,
        run=RunConfig(folder=str(folder)),
        oreal=case.oreal,
        verifier=case.verifier,
        schedule=ScheduleConfig(iterations=1, freeze_iterations=0, warmup_iterations=0),
        monitor=MonitorConfig(wandb="disabled", transcripts_per_iteration=0),
        checkpoint=CheckpointConfig(every=0),
    )
    budget = SNUG if case.chosen["tight"] else ROOMY
    weighs = case.oreal.token_weights.kind != "none"
    token_rm = models.token_rms[case.oreal.token_score] if weighs else None
    with _journal(config) as journal:
        loop = OrealLoop(
            config=config,
            prompts=PromptSampler([g.prompt for g in groups], 0, balance_by_pass_rate=False),
            source=HandedGroups(groups),
            packer=Packer.for_layout(models.source.topology, budget),
            policy=models.policy,
            reference=models.reference,
            token_rm=token_rm,
            weight_sync=None,
            rates=Rates(config),
            journal=journal,
            skipped=SkippedSteps(most=1),
            alarms=RunAlarms(journal),
            engine_checked=True,
        )
        loop.iterate(0)
    return Seen(
        _metrics(folder / "metrics.jsonl"),
        journal.policy_loss,
        journal.token_rm_loss,
        _gradients(models.source, models.policy),
        _gradients(models.source, token_rm) if token_rm else {},
    )


@contextlib.contextmanager
def _journal(config: Config) -> Iterator[Witness]:
    """The journal of a run, its console silent; collective over the world."""
    with contextlib.redirect_stdout(io.StringIO()):
        journal = Witness(config, steps=1)
        with contextlib.closing(journal):
            yield journal


def _metrics(path: Path) -> dict[str, float]:
    """The one line that rank 0 has written, on every rank; collective over the world."""
    line = read_metrics(path)[0] if world_rank() == 0 else {}
    told = msgspec.json.decode(broadcast_bytes(msgspec.json.encode(line)))
    return {name: value for name, value in told.items() if name not in ("kind", "iteration")}


def _gradients(source: ModelSource, model: Policy | TokenRewardModel) -> Tensors:
    """Every gradient as a whole Hugging Face tensor, on every rank; collective over the world.

    A scalar head, which no checkpoint has, keeps Megatron's name on the ranks that have it.
    """
    gradients = {
        name: cast("Any", parameter).main_grad.clone()
        for name, parameter in model.model.named_parameters().items()
    }
    head, dims = {}, source.dims
    if isinstance(model, TokenRewardModel):
        head = {n: gradients.pop(n) for n in list(gradients) if n == "output_layer.weight"}
        dims = replace(dims, tied_embeddings=True)
    stream = open_stream(gradients, source.family, dims, source.place, round_bytes=1 << 16)
    return dict(stream.full_tensors()) | head
