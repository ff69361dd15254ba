"""One iteration of the loop on Megatron against `plain_oreal` on transformers in float64.

Losses, every metric and every gradient, over a set of cases in which every pair of switches meets:
all of them on one rank, some on four, where two share each sequence.

Mutations, each a fault in the code that the loop runs, tried one by one on a dozen of the cases:
`losses`, `metrics` (gradient norms among them) and `gradients` are the tests below that failed.
What is marked "four" shows on the four ranks alone.

| fault | where | what fails |
| --- | --- | --- |
| a token dropped from N- | `objectives.count_tokens` | losses, metrics, gradients |
| w+ and w- swapped | `token_weights` | losses, metrics, gradients |
| KL scaled by the ranks of a sequence | `loop` | losses, metrics, gradients; four |
| exp(logp - stopgrad(logp)) with the other term detached | `objectives` | metrics, gradients |
| logp detached in the KL term | `objectives` | metrics, gradients |
| k1 of the other sign | `kl` | losses, metrics, gradients |
| d of k3 turned round | `kl` | losses, metrics, gradients |
| advantage left out of the negative loss | `objectives` | losses, metrics, gradients |
| cloning always times the advantage | `objectives` | losses, metrics, gradients |
| factors of the two sides swapped | `objectives` | losses, metrics, gradients |
| KL divided by N+ alone | `objectives` | losses, metrics, gradients |
| labels of Eq. 12 inverted | `objectives` | losses, metrics, gradients |
| mean score over all tokens of the micro-batch | `engine.heads` | losses, metrics, gradients |
| running mean of scores from the end | `token_weights` | losses, metrics, gradients |
| topk keeps the smallest | `token_weights` | losses, metrics, gradients |
| N+ and N- of this rank | `loop` | losses, metrics, gradients; four |
| sequences of Eq. 12 of this rank | `loop` | losses, metrics, gradients; four |
| loss of Eq. 12 counted by each rank of a sequence | `engine.heads` | losses; four |
| log-probabilities read one token late | `engine.micro_batch` | losses, metrics, gradients |
| token scores `at` read one token early | `engine.micro_batch` | losses, metrics, gradients |
| rloo: less the mean of all K rewards | `shaping` | losses, metrics, gradients |
| grpo: biased standard deviation | `shaping` | losses, metrics, gradients |
| unverified answers with a reward of 0 in the statistics | `shaping` | losses, metrics, gradients |
| importance weights of e turned round | `importance` | losses, metrics, gradients |
| importance weights of a sequence by the mean of e | `importance` | losses, metrics, gradients |
| importance weights on the KL term too | `objectives` | losses, metrics, gradients |
| the positive side without importance weights | `objectives` | losses, metrics, gradients |
| a token counted for Megatron, which divides | `engine.megatron_model` | metrics, gradients |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_oreal.algorithm import selection, shaping
from megatron_oreal.monitor.metrics import MEASURED
from megatron_oreal.types import Outcome, RolloutGroup
from tests.parity.cases import (
    Case,
    covering_cases,
    covering_levels,
    every_pair,
    make_groups,
    pairs_of,
)
from tests.parity.engine_oreal import LR, SCORES, Seen, see_all
from tests.parity.plain_oreal import Answers, Result, plain_oreal
from tests.ranks import RankPools
from tests.toy_models import VOCAB, write_model

pytestmark = pytest.mark.parallel

CASES = covering_cases()
LETTERS = {Outcome.CORRECT: "+", Outcome.INCORRECT: "-", Outcome.UNVERIFIED: "?"}
HEAD = "output_layer.weight"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Ranks, how many share a sequence, and which of the cases they run."""

    ranks: int
    cases: tuple[Case, ...]
    cp: int = 1


LAYOUTS = {
    "one rank": Layout(1, tuple(CASES)),
    "dp2, cp2": Layout(4, tuple(CASES[::7]), cp=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, and a reference that is a little off it."""
    folder = tmp_path_factory.mktemp("oreal")
    for name in ("policy", "reference"):
        write_model(folder / name, tied=True)
    path = folder / "reference" / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(path).items()
    }
    save_file(moved, path, metadata={"format": "pt"})
    return folder


class Engine:
    """What the ranks of each layout saw, asked once."""

    def __init__(self, ranks: RankPools, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._done: dict[str, dict[int, list[Seen]]] = {}

    def __call__(self, name: str, case: Case) -> list[Seen]:
        if name not in self._done:
            layout = LAYOUTS[name]
            runs = self._folder / name
            pool = self._ranks(layout.ranks)
            by_rank = pool.run(see_all, self._folder, runs, layout.cases, cp=layout.cp)
            by_case = zip(*by_rank, strict=True)
            self._done[name] = {
                case.index: list(seen) for case, seen in zip(layout.cases, by_case, strict=True)
            }
        return self._done[name][case.index]


@pytest.fixture(scope="module")
def engine(ranks: RankPools, folder: Path) -> Engine:
    return Engine(ranks, folder)


class Expected(NamedTuple):
    """What the plain function says, and the gradients of its losses at Hugging Face's weights."""

    result: Result
    metrics: dict[str, float]
    policy: Tensors
    token_rm: Tensors


class Plain:
    """The plain function over Hugging Face models in float64."""

    def __init__(self, folder: Path) -> None:
        def load(name: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)

        self._policy, self._reference = load("policy"), load("reference")
        self._token_rm = load("policy")
        hidden = self._policy.config.hidden_size
        drawn = torch.rand(1, hidden, generator=torch.Generator().manual_seed(0))
        bound = hidden**-0.5
        self._head = (SCORES * (2 * bound * drawn - bound)).double().requires_grad_()

    def __call__(self, case: Case) -> Expected:
        groups = make_groups(case, VOCAB)
        answers = tabulate(groups)
        hidden = self._token_rm.model(answers.tokens).last_hidden_state
        result = plain_oreal(
            case.oreal,
            case.verifier,
            answers,
            pairs=drawn_pairs(case, groups),
            logits=self._policy(answers.tokens).logits,
            reference_logits=self._reference(answers.tokens).logits.detach(),
            scores=hidden @ self._head[0],
        )
        policy = gradients(result.policy_loss, dict(self._policy.named_parameters()))
        metrics = result.metrics | {"oreal/grad_norm": norm(policy), "oreal/learning_rate": LR}
        token_rm = {}
        if case.oreal.token_weights.kind != "none":
            trunk = {f"model.{n}": p for n, p in self._token_rm.model.named_parameters()}
            token_rm = gradients(result.token_rm_loss, trunk | {HEAD: self._head})
            metrics |= {"token_rm/grad_norm": norm(token_rm), "token_rm/learning_rate": LR}
        return Expected(result, metrics, policy, token_rm)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


def gradients(loss: Tensor, parameters: Tensors) -> Tensors:
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def norm(tensors: Tensors) -> float:
    return float(sum(tensor.square().sum() for tensor in tensors.values()) ** 0.5)


def tabulate(groups: list[RolloutGroup]) -> Answers:
    rows = [
        (q, group.prompt.tokens, rollout, LETTERS[verdict.outcome])
        for q, group in enumerate(groups)
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
    ]
    longest = max(len(prompt) + len(rollout.tokens) for _, prompt, rollout, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    response, sampled = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape)
    for row, (_, prompt, rollout, _) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(rollout.tokens)
        tokens[row, :end] = torch.tensor(prompt + rollout.tokens)
        response[row, start:end] = True
        sampled[row, start:end] = torch.tensor(rollout.logprobs)
    return Answers(
        question=torch.tensor([q for q, *_ in rows]),
        outcome=[letter for *_, letter in rows],
        stopped=torch.tensor([rollout.stopped for _, _, rollout, _ in rows]),
        tokens=tokens,
        response=response,
        rollout_logprobs=sampled.double(),
    )


def drawn_pairs(case: Case, groups: list[RolloutGroup]) -> Tensor:
    """Which answers the seeded draw takes, by their tokens."""
    verifier = case.verifier
    kept, _ = shaping.drop_unverified(
        groups, verifier.max_unverified_share, verifier.unverified_is_incorrect
    )
    if case.oreal.selection != "pairs":
        return torch.zeros(sum(len(group.rollouts) for group in groups), dtype=torch.bool)
    chosen = selection.select(shaping.shape_rewards(kept, case.oreal), case.oreal, 0, 0)
    keys = [(t.prompt_id, t.tokens, t.rollout_logprobs) for t in chosen]
    return torch.tensor(
        [
            (group.prompt.id, group.prompt.tokens + rollout.tokens, rollout.logprobs) in keys
            for group in groups
            for rollout in group.rollouts
        ]
    )


class Compared(NamedTuple):
    """A case under a layout: what each rank saw, and what the plain function says."""

    case: Case
    ranks: list[Seen]
    plain: Expected


@pytest.fixture(
    scope="module",
    params=[(name, case) for name, layout in LAYOUTS.items() for case in layout.cases],
    ids=lambda pair: f"{pair[0]}, {pair[1]}",
)
def compared(request: pytest.FixtureRequest, engine: Engine, plain: Plain) -> Compared:
    name, case = request.param
    return Compared(case, engine(name, case), plain(case))


def test_every_pair_of_switches_meets_in_a_case() -> None:
    assert set().union(*map(pairs_of, covering_levels())) == every_pair()


def test_losses(compared: Compared) -> None:
    """The engine's own, as it adds them up over micro-batches and ranks."""
    expected = compared.plain.result
    for seen in compared.ranks:
        policy = pytest.approx(expected.metrics["oreal/loss"], rel=0, abs=1e-6 * expected.size)
        assert seen.policy_loss == policy
        if compared.plain.token_rm:
            loss = expected.token_rm_loss.item()
            assert seen.token_rm_loss == pytest.approx(loss, rel=1e-6)


def test_every_metric(compared: Compared) -> None:
    expected = compared.plain.metrics
    for seen in compared.ranks:
        measured = {n: v for n, v in seen.metrics.items() if not n.startswith(MEASURED)}
        assert measured == pytest.approx(expected, rel=2e-5, abs=2e-5)


def test_every_gradient(compared: Compared) -> None:
    for seen in compared.ranks:
        assert_same(seen.policy_gradients, compared.plain.policy)
        assert_same(seen.token_rm_gradients, compared.plain.token_rm)


def assert_same(got: Tensors, want: Tensors) -> None:
    """Each within 1e-4 of its own norm."""
    assert got.keys() == want.keys()
    errors = {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}
    assert max(errors.values(), default=0.0) < 1e-4, errors
