"""The models of OREAL and what each is asked: policy, frozen reference, token reward model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_oreal.config.schema import Config, OptimizerConfig
from megatron_oreal.config.schema_precision import Role
from megatron_oreal.engine.heads import (
    LogprobHead,
    SequenceObjective,
    TokenScoreHead,
    head_settings,
)
from megatron_oreal.engine.megatron_model import Load, MegatronModel, Refuse, refuse_nothing
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.heads import Objective
from megatron_oreal.parallel.topology import Topology
from megatron_oreal.types import Advance, PackedBatch, advance_nothing


class PolicyStep(NamedTuple):
    """Per trajectory `[response_length]`, from the forward before the update; entropies in nats.

    `refused` says why no weight was changed, where none was.
    """

    logprobs: list[torch.Tensor]
    entropy: list[torch.Tensor]
    loss: float
    grad_norm: float
    refused: str = ""


class TokenRewardStep(NamedTuple):
    """Token scores per trajectory `[response_length]`, from the forward before the update.

    `refused` says why no weight was changed, where none was.
    """

    scores: list[torch.Tensor]
    loss: float
    grad_norm: float
    refused: str = ""


class Reference:
    """The frozen starting point; its log-probabilities anchor the KL term."""

    _role: Role = "reference"
    _trainable: OptimizerConfig | None = None

    def __init__(self, dims: ModelDims, config: Config, topology: Topology, load: Load) -> None:
        self.model = MegatronModel(
            dims, config, topology, self._role, load=load, optimizer=self._trainable
        )
        settings = head_settings(config, math.ceil(dims.vocab / topology.tp_size))
        self._head = LogprobHead(self.model.stages[-1], topology, dims.vocab, settings)

    def logprobs(self, batch: PackedBatch, advance: Advance = advance_nothing) -> PolicyStep:
        """Scores every response token forward only; collective over the world."""
        values = self.model.infer(batch, self._head, advance)
        return PolicyStep(values["logprobs"], values["entropy"], loss=0.0, grad_norm=0.0)


class Policy(Reference):
    """The model that OREAL, or supervised fine-tuning, improves."""

    _role: Role = "policy"

    def __init__(
        self,
        dims: ModelDims,
        config: Config,
        topology: Topology,
        load: Load,
        optimizer: OptimizerConfig,
    ) -> None:
        self._trainable = optimizer
        super().__init__(dims, config, topology, load)

    def step(
        self,
        batch: PackedBatch,
        objective: Objective,
        learning_rate: float,
        advance: Advance = advance_nothing,
        refuse: Refuse = refuse_nothing,
        *,
        settle: bool = True,
    ) -> PolicyStep:
        """Takes one step down the objective of every response token; collective over the world.

        `settle` false: whoever reads the weights before the next step calls `model.settle` first.
        """
        head = replace(self._head, objective=objective)
        result = self.model.step(batch, head, learning_rate, advance, refuse)
        if settle:
            self.model.settle()
        values = result.per_token
        return PolicyStep(
            values["logprobs"],
            values["entropy"],
            loss=result.loss,
            grad_norm=result.grad_norm,
            refused=result.refused,
        )


class TokenRewardModel:
    """Scores response tokens; trained online on the outcomes of the trajectories it scores."""

    def __init__(self, dims: ModelDims, config: Config, topology: Topology, load: Load) -> None:
        self.model = MegatronModel(
            dims, config, topology, "token_rm", load=load, optimizer=config.token_rm_optimizer
        )
        self._head = TokenScoreHead(self.model.stages[-1], topology, config.oreal.token_score)

    def scores(self, batch: PackedBatch) -> list[torch.Tensor]:
        """Scores every response token forward only; collective over the world."""
        return self.model.infer(batch, self._head)["scores"]

    def step(
        self,
        batch: PackedBatch,
        objective: SequenceObjective,
        learning_rate: float,
        advance: Advance = advance_nothing,
        refuse: Refuse = refuse_nothing,
    ) -> TokenRewardStep:
        """Takes one step down the objective of each trajectory's mean score.

        Collective over the world.
        """
        head = replace(self._head, objective=objective)
        result = self.model.step(batch, head, learning_rate, advance, refuse)
        return TokenRewardStep(
            result.per_token["scores"],
            loss=result.loss,
            grad_norm=result.grad_norm,
            refused=result.refused,
        )
