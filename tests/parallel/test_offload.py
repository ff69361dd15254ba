"""What waits in host memory comes back bitwise, and nobody else notices that it was away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.checkpoint.snapshot import Snapshot
from megatron_oreal.config.schema import Config, OptimizerConfig
from megatron_oreal.config.schema_offload import OffloadConfig
from megatron_oreal.engine.megatron_model import MegatronModel
from megatron_oreal.engine.offload import HostCopies, Parked
from tests.ranks import RankPools
from tests.toy_models import (
    TIGHT,
    make_config,
    make_policy,
    make_reference,
    make_token_rm,
    make_trajectories,
    open_models,
    pack,
    write_toy,
)

pytestmark = pytest.mark.parallel

LEARNING_RATE = 1e-3
EVERYTHING = OffloadConfig(optimizer=True, gradients=True, reference=True, token_rm=True)


class Run(NamedTuple):
    """What a rank saw of two steps, and the device bytes by part while nothing runs."""

    policy: list[tuple[float, float]]
    scores: list[torch.Tensor]
    reference: list[torch.Tensor]
    snapshots: dict[str, Snapshot]
    resumed: list[torch.Tensor]
    resident: dict[str, int]


def config_of(folder: Path, offload: OffloadConfig, precision: str) -> Config:
    config = make_config(folder, optimizer=OptimizerConfig(lr=LEARNING_RATE))
    model = replace(config.model, precision=precision)
    return replace(config, model=model, offload=offload)


def train(folder: Path, scratch: Path, offload: OffloadConfig, precision: str) -> Run:
    """Steps twice, saves, steps a second model on from the files; collective over the world."""
    source = open_models(config_of(folder, offload, precision))
    trajectories = make_trajectories()
    batch = pack(trajectories, TIGHT)
    policy, reference, token_rm = make_policy(source), make_reference(source), make_token_rm(source)
    tokens = sum(trajectory.response_length for trajectory in trajectories)
    objective = objectives.sft_objective(tokens)
    score_objective = objectives.token_rm_objective(len(trajectories))
    steps = [policy.step(batch, objective, LEARNING_RATE) for _ in range(2)]
    for _ in range(2):
        token_rm.step(batch, score_objective, LEARNING_RATE)
    models = {"policy": policy.model, "reference": reference.model, "token_rm": token_rm.model}
    resident = {name: resident_bytes(model) for name, model in models.items()}
    stored = {role: source.stored(models[role]) for role in ("policy", "token_rm")}
    for model in stored.values():
        model.prepare()
    snapshots = {role: model.snapshot() for role, model in stored.items()}
    file = scratch / f"{offload.optimizer}-{precision}.safetensors"
    snapshots["policy"].write(file, "here")
    other = make_policy(source)
    source.stored(other.model).read([file], 2)
    resumed = other.step(batch, objective, LEARNING_RATE).logprobs
    return Run(
        policy=[(step.loss, step.grad_norm) for step in steps],
        scores=token_rm.scores(batch),
        reference=reference.logprobs(batch).logprobs,
        snapshots={role: copied(snapshot) for role, snapshot in snapshots.items()},
        resumed=resumed,
        resident=resident,
    )


def copied(snapshot: Snapshot) -> Snapshot:
    """Of its own memory, which the next snapshot would overwrite."""
    return Snapshot({key: value.clone() for key, value in snapshot.tensors.items()}, snapshot.steps)


def resident_bytes(model: MegatronModel) -> int:
    """Bytes behind a model's weights, its gradients, and what its optimizer keeps."""
    held = [*model.named_parameters().values()]
    held += [weight.main_grad for weight in held if hasattr(weight, "main_grad")]
    if model.head == "scalar" or any(hasattr(weight, "main_grad") for weight in held):
        shards = model.optimizer_shards().values()
        held += [tensor for shard in shards for tensor in shard.tensors.values()]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
    return sum(storage.nbytes() for storage in storages.values())


def equal(one: Snapshot, other: Snapshot) -> bool:
    pairs = [(one.tensors[key], other.tensors[key]) for key in one.tensors]
    return one.tensors.keys() == other.tensors.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_everything_offloaded_is_bitwise_the_same(
    ranks: RankPools, tmp_path: Path, precision: str
) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2")
    plain, away = (
        ranks(1).run(train, folder, tmp_path, offload, precision)[0]
        for offload in (OffloadConfig(), EVERYTHING)
    )
    assert away.policy == plain.policy
    for ours, theirs in (
        (away.scores, plain.scores),
        (away.reference, plain.reference),
        (away.resumed, plain.resumed),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for role, snapshot in plain.snapshots.items():
        assert equal(away.snapshots[role], snapshot), role
    size = 4 if precision == "fp32" else 2
    assert away.resident["reference"] == away.resident["token_rm"] == 0
    assert plain.resident["policy"] >= plain.resident["reference"] * 16 // size
    # Of the policy its weights alone are left, which leave for the engines.
    assert (
        plain.resident["reference"] <= away.resident["policy"] < 1.1 * plain.resident["reference"]
    )


def test_views_of_what_was_away_stay_valid() -> None:
    whole = torch.arange(12.0)
    parameter = torch.nn.Parameter(whole[2:])
    view = parameter.detach().view(5, 2)[1:, 1]
    before, seen = whole.clone(), view.clone()
    copies = HostCopies(lambda: [whole, parameter])  # of one storage
    parked = Parked(copies.leave, copies.come_back)
    assert whole.untyped_storage().nbytes() == 0
    for _ in range(2):
        with parked.here(), parked.here():
            assert torch.equal(whole, before)
            assert torch.equal(view, seen)
        assert parameter.untyped_storage().nbytes() == 0
    with parked.here():
        view.zero_()
        before[5::2] = 0
    with parked.here():
        assert torch.equal(parameter, before[2:])


def test_what_was_added_since_leaves_as_well() -> None:
    tensors = [torch.ones(3)]
    copies = HostCopies(lambda: tensors)
    parked = Parked(copies.leave, copies.come_back)
    with parked.here():
        tensors.append(torch.full((2,), 7.0, dtype=torch.bfloat16))
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0]
    with parked.here():
        assert tensors[1].tolist() == [7.0, 7.0]
