"""A checkpoint resumes bitwise in its own layout and within rounding in any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.checkpoint.checkpointer import Checkpointer
from megatron_oreal.config.schema import Precision
from megatron_oreal.engine.megatron_model import MegatronModel
from megatron_oreal.engine.roles import Policy, TokenRewardModel
from megatron_oreal.parallel.collectives import barrier, world_rank
from megatron_oreal.trainer.models import ModelSource
from tests.checkpoints import (
    ADAM,
    LEARNING_RATE,
    SFT,
    begin,
    find,
    save_twice,
)
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

BEFORE, AFTER = 2, 3
EQ_12 = objectives.token_rm_objective(len(make_trajectories()))


class Layout(NamedTuple):
    size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1

    @property
    def degrees(self) -> dict[str, int]:
        return {"tp": self.tp, "pp": self.pp, "cp": self.cp, "vpp": self.vpp}


class Options(NamedTuple):
    distributed_optimizer: bool = True
    precision: Precision = "fp32"
    last_stage_layers: int | None = None


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
    layout = replace(config.parallel, last_stage_layers=options.last_stage_layers)
    source = open_models(replace(config, model=model, parallel=layout))
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
    pool, where = ranks(layout.size), layout.degrees
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
    change_layout(ranks, folder, tmp_path, Case(before, Options()), Case(after, Options()))


def change_layout(ranks: RankPools, folder: Path, out: Path, before: Case, after: Case) -> None:
    """The next three losses of both models are those of the run that stayed as it was."""
    unbroken = ranks(before.layout.size).run(
        train_and_save, folder, out, before.options, **before.layout.degrees
    )
    resumed = ranks(after.layout.size).run(
        resume, folder, out, after.options, **after.layout.degrees
    )
    for rank in resumed:
        assert len(rank.policy) == len(rank.token_rm) == 3
        assert rank.policy == pytest.approx(unbroken[0].policy, rel=1e-4)
        assert rank.token_rm == pytest.approx(unbroken[0].token_rm, rel=1e-4)


UNEVEN = Case(Layout(2, pp=2), Options(last_stage_layers=1))
CONTEXT = Case(Layout(2, cp=2), Options())
INTERLEAVED = Case(Layout(2, pp=2, vpp=2), Options())


@pytest.mark.parametrize(
    ("before", "after"),
    [(UNEVEN, CONTEXT), (CONTEXT, INTERLEAVED), (INTERLEAVED, UNEVEN)],
    ids=["uneven-cp2", "cp2-interleaved", "interleaved-uneven"],
)
def test_four_layers_go_on_wherever_they_lie(
    ranks: RankPools, tmp_path: Path, before: Case, after: Case
) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2_tied", num_hidden_layers=4)
    change_layout(ranks, folder, tmp_path / "out", before, after)


def test_stages_of_an_interleaved_pipeline_go_on_bitwise(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2_tied", num_hidden_layers=4)
    out, where = tmp_path / "out", INTERLEAVED.layout.degrees
    unbroken = ranks(2).run(train_and_save, folder, out, Options(), **where)
    resumed = ranks(2).run(resume, folder, out, Options(), **where)
    for got, want in zip(resumed, unbroken, strict=True):
        assert_bitwise(got, want)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_another_optimizer_goes_on_within_rounding(
    ranks: RankPools, folders: Folders, tmp_path: Path, before: bool, after: bool
) -> None:
    folder = folders(tied=False)
    unbroken = ranks(2).run(train_and_save, folder, tmp_path, Options(before))
    resumed = ranks(2).run(resume, folder, tmp_path, Options(after))
    assert resumed[0].policy == pytest.approx(unbroken[0].policy, rel=1e-4)
    assert resumed[0].token_rm == pytest.approx(unbroken[0].token_rm, rel=1e-4)


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
    changed = ("other settings than the checkpoint's: parallel.tensor 1 -> 2",)
    assert whole[0].remarks == (changed if after.tp == 2 else ())
    assert all(f"{damaged.name} has changed" in rank.remarks[0] for rank in broken)


def spoil(model: MegatronModel) -> None:
    """Overwrites every weight and both moments of this rank."""
    with torch.no_grad():
        for shard in model.optimizer_shards().values():
            assert len(shard.tensors) == 3
            for values in shard.tensors.values():
                values.fill_(7.0)
        for values in model.parameters().values():
            values.fill_(7.0)


def save_and_spoil(folder: Path, out: Path, root: Path) -> None:
    """Saves twice, by hand and behind the training, spoils the model, then lets it be written."""
    source, policy, token_rm = make_models(folder, Options())
    take_steps(policy, token_rm, BEFORE)
    checkpointer = Checkpointer(source.config, "train", root)
    models = {"policy": source.stored(policy.model), "token_rm": source.stored(token_rm.model)}
    begin(checkpointer, BEFORE, models)
    again = {role: source.stored(model.model) for role, model in models.items()}
    for stored in again.values():
        stored.prepare()
    copies = {role: stored.snapshot() for role, stored in again.items()}
    spoil(policy.model)
    spoil(token_rm.model)
    for role, copy in copies.items():
        (out / role).mkdir(parents=True, exist_ok=True)
        copy.write(out / role / f"rank_{world_rank()}.safetensors", "")
    outcome = checkpointer.settle()
    assert outcome is not None
    assert not outcome.problem


def restore(folder: Path, root: Path) -> Losses:
    source, policy, token_rm = make_models(folder, Options())
    found = Checkpointer(source.config, "train", root).find()
    assert found is not None
    found.restore(
        {"policy": source.stored(policy.model), "token_rm": source.stored(token_rm.model)}
    )
    return finish(source, policy, token_rm)


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, tp=2)], ids=["dp2", "tp2"])
def test_what_is_saved_is_a_snapshot(
    ranks: RankPools, folders: Folders, tmp_path: Path, layout: Layout
) -> None:
    """Nothing that happens once `save` has returned is in the checkpoint."""
    folder, pool, where = folders(tied=False), ranks(layout.size), layout.degrees
    unbroken = pool.run(train_and_save, folder, tmp_path / "unbroken", Options(), **where)
    pool.run(save_and_spoil, folder, tmp_path / "copies", tmp_path / "root", **where)
    copied = pool.run(resume, folder, tmp_path / "copies", Options(), **where)
    behind = pool.run(restore, folder, tmp_path / "root", **where)
    for got, want in zip([*copied, *behind], [*unbroken, *unbroken], strict=True):
        assert_bitwise(got, want)
