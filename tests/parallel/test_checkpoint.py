"""A checkpoint resumes bitwise in its own layout and within rounding in any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.checkpoint.checkpointer import Checkpointer
from megatron_oreal.config.schema import OptimizerConfig, Precision
from megatron_oreal.engine.megatron_model import MegatronModel
from megatron_oreal.engine.roles import Policy, TokenRewardModel
from megatron_oreal.parallel.collectives import barrier, world_rank
from megatron_oreal.trainer.models import ModelSource
from megatron_oreal.trainer.resume import SftProgress
from tests.ranks import RankPools
from tests.toy_models import (
    make_config,
    make_policy,
    make_token_rm,
    make_trajectories,
    open_models,
    pack,
    whole_weights,
    write_model,
    write_toy,
)

pytestmark = pytest.mark.parallel

LEARNING_RATE, BEFORE, AFTER = 1e-3, 2, 2
# Adam's eps stands above the rounding of a gradient, which layouts differ by.
ADAM = OptimizerConfig(lr=LEARNING_RATE, eps=1e-5)
# The negative term of Eq. 11 adds no more to a loss than its parts; these add up to one sign.
SFT = objectives.sft_objective(sum(t.response_length for t in make_trajectories()))
EQ_12 = objectives.token_rm_objective(len(make_trajectories()))


class Layout(NamedTuple):
    size: int
    tp: int = 1
    pp: int = 1


class Options(NamedTuple):
    distributed_optimizer: bool = True
    precision: Precision = "fp32"


class Losses(NamedTuple):
    """What a rank saw of some steps, and the weights after them."""

    policy: list[float]
    token_rm: list[float]
    policy_weights: dict[str, torch.Tensor]
    token_rm_weights: dict[str, torch.Tensor]


def make_models(folder: Path, options: Options) -> tuple[ModelSource, Policy, TokenRewardModel]:
    config = make_config(
        folder, optimizer=ADAM, distributed_optimizer=options.distributed_optimizer
    )
    model = replace(config.model, precision=options.precision)
    source = open_models(replace(config, model=model))
    return source, make_policy(source), make_token_rm(source)


def take_steps(policy: Policy, token_rm: TokenRewardModel, count: int) -> tuple[list, list]:
    batch = pack(make_trajectories())
    return (
        [policy.step(batch, SFT, LEARNING_RATE).loss for _ in range(count)],
        [token_rm.step(batch, EQ_12, LEARNING_RATE).loss for _ in range(count)],
    )


def save(source: ModelSource, model: MegatronModel, folder: Path) -> int:
    stored = source.stored(model)
    stored.prepare()
    stored.snapshot().write(folder / f"rank_{world_rank()}.safetensors", "")
    return model.steps_taken()


def train_and_save(folder: Path, out: Path, options: Options, steps: int = BEFORE) -> Losses:
    """Steps, saves, steps on; the losses after the save."""
    source, policy, token_rm = make_models(folder, options)
    take_steps(policy, token_rm, steps)
    for name, role in (("policy", policy), ("token_rm", token_rm)):
        if world_rank() == 0:
            (out / name).mkdir(parents=True)
        barrier()
        assert save(source, role.model, out / name) == steps
    barrier()
    return finish(source, policy, token_rm)


def resume(folder: Path, out: Path, options: Options, steps: int = BEFORE) -> Losses:
    """Fills models that have done nothing yet and steps on."""
    source, policy, token_rm = make_models(folder, options)
    for name, role in (("policy", policy), ("token_rm", token_rm)):
        source.stored(role.model).read(sorted((out / name).iterdir()), steps)
        assert role.model.steps_taken() == steps
    return finish(source, policy, token_rm)


def finish(source: ModelSource, policy: Policy, token_rm: TokenRewardModel) -> Losses:
    losses = take_steps(policy, token_rm, AFTER)
    return Losses(*losses, whole_weights(source, policy), whole_weights(source, token_rm))


def assert_bitwise(got: Losses, want: Losses) -> None:
    assert (got.policy, got.token_rm) == (want.policy, want.token_rm)
    for ours, theirs in (
        (got.policy_weights, want.policy_weights),
        (got.token_rm_weights, want.token_rm_weights),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Case(NamedTuple):
    layout: Layout
    options: Options
    tied: bool = False


CASES = {
    "alone": Case(Layout(1), Options()),
    "alone, bf16": Case(Layout(1), Options(precision="bf16")),
    "alone, plain": Case(Layout(1), Options(distributed_optimizer=False)),
    "dp2": Case(Layout(2), Options()),
    "dp2, bf16": Case(Layout(2), Options(precision="bf16")),
    "dp2, bf16, plain": Case(Layout(2), Options(False, "bf16"), tied=True),
    "tp2": Case(Layout(2, tp=2), Options()),
    "tp2, bf16, plain": Case(Layout(2, tp=2), Options(False, "bf16")),
    "pp2": Case(Layout(2, pp=2), Options()),
    "pp2, tied": Case(Layout(2, pp=2), Options(), tied=True),
    "pp2, bf16, tied": Case(Layout(2, pp=2), Options(precision="bf16"), tied=True),
    "tp2 dp2": Case(Layout(4, tp=2), Options()),
}


class Folders:
    """The toy model, tied or not."""

    def __init__(self, root: Path) -> None:
        self._folders = {tied: write_model(root / str(tied), tied=tied) for tied in (True, False)}

    def __call__(self, *, tied: bool) -> Path:
        return self._folders[tied]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, folders: Folders) -> Path:
    return folders(tied=request.param)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_same_layout_goes_on_bitwise(
    ranks: RankPools, folders: Folders, tmp_path: Path, case: Case
) -> None:
    layout, folder = case.layout, folders(tied=case.tied)
    pool = ranks(layout.size)
    where = {"tp": layout.tp, "pp": layout.pp}
    unbroken = pool.run(train_and_save, folder, tmp_path, case.options, **where)
    resumed = pool.run(resume, folder, tmp_path, case.options, **where)
    for got, want in zip(resumed, unbroken, strict=True):
        assert_bitwise(got, want)


def test_before_the_first_step_there_are_no_moments(
    ranks: RankPools, folders: Folders, tmp_path: Path
) -> None:
    folder = folders(tied=False)
    unbroken = ranks(2).run(train_and_save, folder, tmp_path, Options(), 0)
    resumed = ranks(2).run(resume, folder, tmp_path, Options(), 0)
    for got, want in zip(resumed, unbroken, strict=True):
        assert_bitwise(got, want)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(2, tp=2), Layout(1)),
        (Layout(1), Layout(2, tp=2)),
        (Layout(2, pp=2), Layout(1)),
        (Layout(2), Layout(1)),
        (Layout(2), Layout(2, pp=2)),
        (Layout(4, tp=2, pp=2), Layout(2)),
        (Layout(2), Layout(4, tp=4)),
    ],
    ids=["tp2-1", "1-tp2", "pp2-1", "dp2-1", "dp2-pp2", "tp2pp2-dp2", "dp2-tp4"],
)
def test_another_layout_goes_on_within_rounding(
    ranks: RankPools, folder: Path, tmp_path: Path, before: Layout, after: Layout
) -> None:
    unbroken = ranks(before.size).run(
        train_and_save, folder, tmp_path, Options(), tp=before.tp, pp=before.pp
    )
    resumed = ranks(after.size).run(resume, folder, tmp_path, Options(), tp=after.tp, pp=after.pp)
    for rank in resumed:
        assert rank.policy == pytest.approx(unbroken[0].policy, rel=1e-4)
        assert rank.token_rm == pytest.approx(unbroken[0].token_rm, rel=1e-4)


def test_stages_of_an_interleaved_pipeline_are_found_in_any_layout(
    ranks: RankPools, tmp_path: Path
) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2_tied", num_hidden_layers=4)
    interleaved, out = {"pp": 2, "vpp": 2}, tmp_path / "out"
    unbroken = ranks(2).run(train_and_save, folder, out, Options(), **interleaved)
    resumed = ranks(2).run(resume, folder, out, Options(), **interleaved)
    for got, want in zip(resumed, unbroken, strict=True):
        assert_bitwise(got, want)
    (alone,) = ranks(1).run(resume, folder, out, Options())
    assert alone.policy == pytest.approx(unbroken[0].policy, rel=1e-4)
    assert alone.token_rm == pytest.approx(unbroken[0].token_rm, rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_another_optimizer_goes_on_within_rounding(
    ranks: RankPools, folders: Folders, tmp_path: Path, before: bool, after: bool
) -> None:
    folder = folders(tied=False)
    unbroken = ranks(2).run(train_and_save, folder, tmp_path, Options(before))
    resumed = ranks(2).run(resume, folder, tmp_path, Options(after))
    assert resumed[0].policy == pytest.approx(unbroken[0].policy, rel=1e-4)
    assert resumed[0].token_rm == pytest.approx(unbroken[0].token_rm, rel=1e-4)


class Found(NamedTuple):
    """What a rank resumed from, and the weights it has then."""

    folder: str
    remarks: tuple[str, ...]
    steps: dict[str, int]
    weights: dict[str, torch.Tensor]


def open_checkpointer(folder: Path, root: Path) -> tuple[Checkpointer, ModelSource, Policy]:
    source = open_models(make_config(folder, optimizer=ADAM))
    return Checkpointer(source.config, "train", root), source, make_policy(source)


def save_twice(folder: Path, root: Path) -> list[dict[str, torch.Tensor]]:
    """Saves after each of two steps; the weights then."""
    checkpointer, source, policy = open_checkpointer(folder, root)
    models, weights = {"policy": source.stored(policy.model)}, []
    for done in (1, 2):
        policy.step(pack(make_trajectories()), SFT, LEARNING_RATE)
        assert save_whole(checkpointer, done, models) == ""
        weights.append(whole_weights(source, policy))
    return weights


def find(folder: Path, root: Path) -> Found:
    checkpointer, source, policy = open_checkpointer(folder, root)
    found = checkpointer.find()
    assert found is not None
    found.restore({"policy": source.stored(policy.model)})
    weights = whole_weights(source, policy)
    return Found(found.folder.name, found.remarks, found.state.steps, weights)


@pytest.mark.parametrize("after", [Layout(1), Layout(2), Layout(4, tp=2)])
def test_all_ranks_pass_over_what_one_of_them_finds_damaged(
    ranks: RankPools, folders: Folders, tmp_path: Path, after: Layout
) -> None:
    folder = folders(tied=False)
    weights = ranks(2).run(save_twice, folder, tmp_path)[0]
    whole = ranks(after.size).run(find, folder, tmp_path, tp=after.tp)
    damaged = tmp_path / "iteration_000002" / "policy.rank_00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    broken = ranks(after.size).run(find, folder, tmp_path, tp=after.tp)
    for results, steps in ((whole, 2), (broken, 1)):
        for rank in results:
            assert rank.folder == f"iteration_{steps:06d}"
            assert rank.steps == {"policy": steps}
            assert all(torch.equal(weights[steps - 1][n], w) for n, w in rank.weights.items())
    assert not whole[0].remarks
    assert all(f"{damaged.name} has changed" in rank.remarks[0] for rank in broken)
