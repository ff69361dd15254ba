"""What a rank does under a layout: three steps of policy and token_rm, and what it saw of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.checkpoint.tensors import StoredModel
from megatron_oreal.config.schema import Config, OptimizerConfig, Precision
from megatron_oreal.engine.roles import PolicyStep, TokenRewardStep
from megatron_oreal.weights.geometry import Box, Region
from tests.parallel.invariance.batch import (
    OREAL,
    ROOMY,
    TIGHT,
    drawn_weights,
    replay,
)
from tests.parallel.invariance.layouts import Layout
from tests.ranks import RankPool
from tests.toy_models import (
    make_config,
    make_policy,
    make_reference,
    make_token_rm,
    open_models,
    pack,
)

LEARNING_RATE, STEPS = 1e-3, 3
# Adam's eps stands above the rounding of a gradient (up to 1e-7 here), which the default would blow
# up to whole steps where an element's gradient is next to nothing; typical ones are 1e-3.
ADAM = OptimizerConfig(lr=LEARNING_RATE, eps=1e-5)


class Piece(NamedTuple):
    """A box of a Hugging Face tensor as a rank holds it."""

    tensor: str
    box: Box
    values: torch.Tensor


class Trained(NamedTuple):
    """Three steps of a model.

    `gradients` are the first step's, as the optimizer used them; `start` and `kept` the optimizer's
    own fp32 weights before the steps and after them, as far as they are this rank's share;
    `weights` what the model has at the end.
    """

    steps: list[PolicyStep] | list[TokenRewardStep]
    gradients: list[Piece]
    start: list[Piece]
    kept: list[Piece]
    weights: list[Piece]


class Seen(NamedTuple):
    """What a rank saw."""

    reference: list[torch.Tensor]
    policy: Trained
    token_rm: Trained


def run(pool: RankPool, folder: Path, layouts: Sequence[Layout]) -> list[list[Seen]]:
    """Runs layouts of one parallel shape on the ranks of a pool; what each rank saw, by layout."""
    by_rank = pool.run(see_all, folder, layouts, **degrees_of(layouts[0]))
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def degrees_of(layout: Layout) -> dict[str, int]:
    """What a pool of ranks is to be set up with."""
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp}


def see_all(folder: Path, layouts: Sequence[Layout]) -> list[Seen]:
    """Collective over the world."""
    logging.getLogger("megatron").setLevel(logging.ERROR)  # else it is told of each model it builds
    return [see(folder, layout) for layout in layouts]


def see(folder: Path, layout: Layout) -> Seen:
    """Trains policy and token_rm from the same start; collective over the world."""
    turn = -1 if layout.backwards else 1
    trajectories = replay(folder / "recorded")
    weights = drawn_weights(trajectories)[::turn]
    trajectories = trajectories[::turn]
    batch = pack(trajectories, budget_of(layout))
    reference = make_reference(open_models(config_of(folder / "reference", layout)))
    anchors = reference.logprobs(batch).logprobs
    fields = objectives.policy_fields(trajectories, weights, anchors)
    batch = batch.with_fields(**fields)
    source = open_models(config_of(folder / "policy", layout))
    policy, token_rm = make_policy(source), make_token_rm(source)
    eq_11 = objectives.policy_objective(OREAL, *objectives.count_tokens(trajectories))
    eq_12 = objectives.token_rm_objective(len(trajectories))
    trained = [
        _train(source.stored(policy.model), lambda: policy.step(batch, eq_11, LEARNING_RATE)),
        _train(source.stored(token_rm.model), lambda: token_rm.step(batch, eq_12, LEARNING_RATE)),
    ]
    return Seen(anchors[::turn], *(t._replace(steps=_turned(t.steps, turn)) for t in trained))


def _turned(steps: list[Any], turn: int) -> list[Any]:
    """The steps with what they hold of each trajectory in the record's order."""
    return [
        step._replace(**{k: v[::turn] for k, v in step._asdict().items() if isinstance(v, list)})
        for step in steps
    ]


def config_of(model: Path, layout: Layout) -> Config:
    """The configuration of a layout whose ranks are set up already."""
    config = make_config(
        model,
        sequence_parallel=layout.sequence_parallel,
        distributed_optimizer=layout.distributed_optimizer,
        optimizer=ADAM,
    )
    precision: Precision = "bf16" if layout.bf16 else "fp32"
    engine = replace(
        config.engine,
        tokens_per_micro_batch=budget_of(layout),
        pad_to_budget=layout.filled,
        recompute=layout.recompute,
    )
    return replace(config, model=replace(config.model, precision=precision), engine=engine)


def budget_of(layout: Layout) -> int:
    """Tokens of a micro-batch."""
    return TIGHT if layout.tight else ROOMY


def _train(stored: StoredModel, step: Callable[[], Any]) -> Trained:
    start = kept_weights(stored)
    first = step()
    gradients = summed_gradients(stored)
    steps = [first, *(step() for _ in range(STEPS - 1))]
    weights = cut(stored.regions, stored.model.parameters())
    return Trained(steps, gradients, start, kept_weights(stored), weights)


def summed_gradients(stored: StoredModel) -> list[Piece]:
    """The gradients as far as this rank has their sum over all ranks; not collective.

    That is the optimizer's share: elsewhere a rank's buffer holds unfinished sums.
    """
    shards = stored.model.optimizer_shards()
    regions = [region for name in shards for region in stored.regions_of(name, shards[name])]
    buffers: dict[str, Any] = dict(stored.model.named_parameters())
    return cut(regions, {name: buffers[name].main_grad for name in shards})


def kept_weights(stored: StoredModel) -> list[Piece]:
    """The weights as the optimizer keeps them, this rank's share; not collective."""
    pieces = []
    for name, shard in stored.model.optimizer_shards().items():
        whole = torch.zeros(stored.model.parameters()[name].shape)
        values = shard.tensors["weight"]
        whole.view(-1)[shard.start : shard.start + len(values)] = values
        pieces += cut(stored.regions_of(name, shard), {name: whole})
    return pieces


def cut(regions: Sequence[Region], tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
    """Copies these regions of local tensors."""
    return [
        Piece(region.tensor, region.box, tensors[region.key][region.local.slices].clone())
        for region in regions
    ]
