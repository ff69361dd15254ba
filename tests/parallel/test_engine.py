"""One step is one step: the same numbers in every layout, and training sees what inference saw."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.algorithm.token_weights import token_weights
from megatron_oreal.config.schema import OptimizerConfig, OrealConfig, TokenWeightsConfig
from megatron_oreal.engine.micro_batch import lay_out
from megatron_oreal.engine.roles import PolicyStep, TokenRewardStep
from megatron_oreal.models.build import PackedGPT
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu
from megatron_oreal.types import PackedBatch, Trajectory
from tests.ranks import RankPools
from tests.toy_models import (
    ROOMY,
    TIGHT,
    VOCAB,
    make_config,
    make_policy,
    make_reference,
    make_token_rm,
    make_trajectories,
    open_models,
    pack,
    whole_weights,
    write_toy,
)

pytestmark = pytest.mark.parallel

LEARNING_RATE, STEPS = 1e-3, 2
# Adam's eps stands above the rounding of a gradient (1e-8 here), which the default would blow up
# to whole steps where an element's gradient is next to nothing.
ADAM = OptimizerConfig(lr=LEARNING_RATE, eps=1e-5)
EVERYTHING = 5  # trajectories


class Case(NamedTuple):
    """A layout, and what else of the engine may not change the result."""

    size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    layers: int = 2
    budget: int = ROOMY
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    recompute: str = "none"
    pad_to_budget: bool = False
    trajectories: int = EVERYTHING
    tied: bool = False


PLAIN = Case(1, distributed_optimizer=False)
CASES = {
    "one rank, micro-batches": Case(1, budget=TIGHT),
    "tp2, no sequence parallelism": Case(2, tp=2, sequence_parallel=False),
    "tp2 cp2, all recomputed": Case(4, tp=2, cp=2, budget=TIGHT, recompute="full"),
    "cp2 dp2, one trajectory": Case(4, cp=2, trajectories=1),
    "tp2 pp2 vpp2, MLPs recomputed": Case(
        4, tp=2, pp=2, vpp=2, layers=4, budget=TIGHT, recompute="selective"
    ),
    "pp2 vpp2 dp2, one trajectory, tied": Case(4, pp=2, vpp=2, layers=4, trajectories=1, tied=True),
    "pp2 cp2, filled up, tied": Case(4, pp=2, cp=2, budget=TIGHT, pad_to_budget=True, tied=True),
    "tp4, half a group of heads each, tied": Case(4, tp=4, tied=True),
    "dp4, three trajectories": Case(4, trajectories=3),
    "tp2 dp2, plain optimizer, one trajectory": Case(
        4, tp=2, distributed_optimizer=False, trajectories=1
    ),
}
"""A choice of layouts, `test_invariance` has more; and where a data-parallel rank has nothing."""


class Run(NamedTuple):
    """What a rank saw of two steps of the policy and of the token_rm.

    `head` is the token_rm's scalar head after them, None off the last pipeline stage.
    """

    reference: PolicyStep
    before: PolicyStep
    policy: list[PolicyStep]
    after: PolicyStep
    policy_weights: dict[str, torch.Tensor]
    scores_before: list[torch.Tensor]
    token_rm: list[TokenRewardStep]
    token_rm_weights: dict[str, torch.Tensor]
    head: torch.Tensor | None


def fields_of(trajectories: list[Trajectory]) -> dict[str, list[torch.Tensor]]:
    """The fields of Eq. 11 for token scores drawn in +-3 and a reference that disagrees."""
    generator = torch.Generator().manual_seed(11)
    lengths = [trajectory.response_length for trajectory in trajectories]
    scores = [torch.rand(n, generator=generator) * 6 - 3 for n in lengths]
    reference = [torch.randn(n, generator=generator) - 4 for n in lengths]
    weights = token_weights(scores, [t.reward for t in trajectories], TokenWeightsConfig())
    return objectives.policy_fields(trajectories, weights, reference)


def two_steps(folder: Path, case: Case) -> Run:
    """Trains policy and token_rm from the same start; collective over the world."""
    source = open_models(
        make_config(
            folder,
            sequence_parallel=case.sequence_parallel,
            distributed_optimizer=case.distributed_optimizer,
            optimizer=ADAM,
            tokens_per_micro_batch=case.budget,
            recompute=case.recompute,
            pad_to_budget=case.pad_to_budget,
        )
    )
    trajectories = make_trajectories(case.trajectories)
    batch: PackedBatch = pack(trajectories, case.budget).with_fields(**fields_of(trajectories))
    policy, token_rm = make_policy(source), make_token_rm(source)
    objective = objectives.policy_objective(OrealConfig(), *objectives.count_tokens(trajectories))
    score_objective = objectives.token_rm_objective(len(trajectories))
    return Run(
        reference=make_reference(source).logprobs(batch),
        before=policy.logprobs(batch),
        policy=[policy.step(batch, objective, LEARNING_RATE) for _ in range(STEPS)],
        after=policy.logprobs(batch),
        policy_weights=whole_weights(source, policy),
        scores_before=token_rm.scores(batch),
        token_rm=[token_rm.step(batch, score_objective, LEARNING_RATE) for _ in range(STEPS)],
        token_rm_weights=whole_weights(source, token_rm),
        head=token_rm.model.parameters().get("output_layer.weight"),
    )


class Runs:
    """Runs every case once, on a checkpoint of as many layers."""

    def __init__(self, ranks: RankPools, root: Path) -> None:
        self._ranks, self._root = ranks, root
        self._done: dict[Case, list[Run]] = {}

    def __call__(self, case: Case) -> list[Run]:
        if case not in self._done:
            toy = "qwen2_tied" if case.tied else "qwen2"
            pool, folder = self._ranks(case.size), self._root / toy / str(case.layers)
            if not folder.exists():
                write_toy(folder, toy, num_hidden_layers=case.layers)
            layout = {"tp": case.tp, "pp": case.pp, "cp": case.cp, "vpp": case.vpp}
            self._done[case] = pool.run(two_steps, folder, case, **layout)
        return self._done[case]

    def plain(self, case: Case) -> Run:
        """The same trajectories on one rank, in one micro-batch."""
        plain = PLAIN._replace(trajectories=case.trajectories, layers=case.layers, tied=case.tied)
        return self(plain)[0]


@pytest.fixture(scope="module")
def runs(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("engine"))


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def assert_all_close(got: list[torch.Tensor], want: list[torch.Tensor], atol: float) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_same_weights(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        difference = float((tensor - want[name]).abs().max())
        assert difference <= 0.02 * LEARNING_RATE * STEPS, (name, difference)


def sum_of_terms(run: Run, step: int, trajectories: list[Trajectory]) -> float:
    """The sum of the absolute parts of the policy's loss: what rounding is relative to."""
    fields = {name: torch.cat(values) for name, values in fields_of(trajectories).items()}
    terms = objectives.policy_loss_terms(
        OrealConfig(),
        *objectives.count_tokens(trajectories),
        torch.cat(run.policy[step].logprobs),
        fields,
    )
    return sum(float(term.abs().sum()) for term in terms.values())


def test_a_policy_step_is_the_same_in_every_layout(runs: Runs, case: Case) -> None:
    plain, trajectories = runs.plain(case), make_trajectories(case.trajectories)
    for rank in runs(case):
        for i, (step, expected) in enumerate(zip(rank.policy, plain.policy, strict=True)):
            assert_all_close(step.logprobs, expected.logprobs, 1e-5)
            assert_all_close(step.entropy, expected.entropy, 1e-5)
            terms = sum_of_terms(plain, i, trajectories)
            assert step.loss == pytest.approx(expected.loss, rel=0, abs=1e-6 * terms)
            assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert_all_close(rank.after.logprobs, plain.after.logprobs, 2e-5)
        assert_same_weights(rank.policy_weights, plain.policy_weights)


def test_a_token_rm_step_is_the_same_in_every_layout(runs: Runs, case: Case) -> None:
    plain = runs.plain(case)
    assert plain.head is not None
    heads = [rank.head for rank in runs(case) if rank.head is not None]
    assert len(heads) == case.size // case.pp
    for rank in runs(case):
        for step, expected in zip(rank.token_rm, plain.token_rm, strict=True):
            assert_all_close(step.scores, expected.scores, 1e-5)
            assert step.loss == pytest.approx(expected.loss, rel=0, abs=1e-6 * expected.loss)
            assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert_same_weights(rank.token_rm_weights, plain.token_rm_weights)
    for head in heads:
        assert_same_weights({"head": head}, {"head": plain.head})


def test_training_sees_bitwise_what_inference_saw(runs: Runs, case: Case) -> None:
    for rank in runs(case):
        first = rank.policy[0]
        for values in zip(
            first.logprobs, rank.before.logprobs, rank.reference.logprobs, strict=True
        ):
            assert torch.equal(values[0], values[1])
            assert torch.equal(values[0], values[2])
        assert all(
            torch.equal(*pair) for pair in zip(first.entropy, rank.before.entropy, strict=True)
        )
        trained = rank.token_rm[0].scores
        assert all(torch.equal(*pair) for pair in zip(trained, rank.scores_before, strict=True))


def test_every_rank_is_told_the_same(runs: Runs, case: Case) -> None:
    first, *others = runs(case)
    for rank in others:
        for step, expected in zip(
            [*rank.policy, rank.after], [*first.policy, first.after], strict=True
        ):
            assert (step.loss, step.grad_norm) == (expected.loss, expected.grad_norm)
            assert all(
                torch.equal(*pair) for pair in zip(step.logprobs, expected.logprobs, strict=True)
            )


def test_the_plain_run_is_what_the_formulas_say(runs: Runs) -> None:
    """The loss by hand from the log-probabilities; and the steps did move the model."""
    run, trajectories = runs.plain(PLAIN), make_trajectories()
    fields = {name: torch.cat(values).double() for name, values in fields_of(trajectories).items()}
    logprobs = torch.cat(run.policy[0].logprobs).double()
    positive, negative = fields["reward"] > 0, fields["reward"] < 0
    weighed = fields["advantage"] * fields["token_weight"]
    d = fields["reference_logprobs"] - logprobs
    loss = (
        -(logprobs * weighed)[positive].sum() / positive.sum()
        - 0.5 * weighed[negative].sum() / negative.sum()
        + 0.01 * (d.exp() - d - 1).mean()
    )
    assert run.policy[0].loss == pytest.approx(float(loss), rel=1e-5)
    means = torch.stack([scores.double().mean() for scores in run.token_rm[0].scores])
    signs = torch.tensor([trajectory.reward for trajectory in trajectories])
    eq_12 = torch.nn.functional.softplus(-signs * means).mean()
    assert run.token_rm[0].loss == pytest.approx(float(eq_12), rel=1e-5)
    assert run.policy[1].loss < run.policy[0].loss
    assert run.token_rm[1].loss < run.token_rm[0].loss
    assert len(run.policy_weights["model.embed_tokens.weight"]) == VOCAB


def kept_bytes(folder: Path, recompute: str) -> int:
    """Bytes of what a forward pass keeps for the backward pass."""
    policy = make_policy(open_models(make_config(folder, recompute=recompute)))
    batch = pack(make_trajectories())
    laid = lay_out(batch, batch.micro_batches[0][0], topology.current().cut)
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters().values()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with cuda_on_cpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.model.stages[0](**PackedGPT.packed_inputs(laid.tokens, laid.packed))
    return sum(kept.values())


def test_what_is_recomputed_is_not_kept(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2")
    kept = [ranks(1).run(kept_bytes, folder, how)[0] for how in ("full", "selective", "none")]
    assert kept[0] < 0.7 * kept[1] < 0.7 * kept[2], kept
