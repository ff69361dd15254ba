"""One rollout engine put through the contract; `rollout_program.py` says which engines."""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import RolloutConfig, SamplingConfig
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import (
    all_gather_bytes,
    barrier,
    broadcast_bytes,
    world_rank,
)
from megatron_oreal.rollout.bank import BankedSampler, Banks
from megatron_oreal.rollout.engine import Request
from megatron_oreal.rollout.record import RecordHeader
from megatron_oreal.rollout.seeds import sample_seed
from megatron_oreal.rollout.weight_sync import WeightSync, WholeTensorRoute
from megatron_oreal.types import Prompt
from megatron_oreal.weights.bridge import HfStream, Survey
from megatron_oreal.weights.layout import hf_regions
from megatron_oreal.weights.plan import TensorSpec, make_plan
from megatron_oreal.weights.sums import source_sums
from tests.contracts.rollout_models import (
    GREEDY,
    SAMPLED,
    STOP,
    WINDOW,
    checkpoint,
    greedy_tokens,
    load,
    logprob_differences,
    prompts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from megatron_oreal.rollout.engine import Sampler
    from megatron_oreal.rollout.vllm_inprocess import VllmInProcess
    from megatron_oreal.rollout.vllm_server import VllmServer
    from megatron_oreal.types import Rollout
    from megatron_oreal.weights.transport import Meddle


def alike_on_all_ranks(rollouts: list[Rollout]) -> bool:
    payloads = all_gather_bytes(json.dumps([asdict(rollout) for rollout in rollouts]).encode())
    return len(set(payloads)) == 1


class Case:
    """One engine of any backend on one pair of models."""

    def __init__(
        self,
        folder: Path,
        kind: type[VllmInProcess | VllmServer],
        precision: str,
        more: Mapping[str, Any] | None = None,
        **rollout: Any,
    ) -> None:
        self.folder = folder
        started = time.monotonic()
        self.engine = kind(
            str(folder / "old"),
            RolloutConfig(max_sequences=8, enforce_eager=True, **rollout),
            precision=precision,
            max_total_tokens=WINDOW,
            stop_token_id=STOP,
            decode=lambda tokens: " ".join(map(str, tokens)),
            **more or {},
        )
        self.found: dict[str, Any] = {"start_s": time.monotonic() - started}
        self.requests = [
            Request(tokens, sample_seed(0, 0, str(i), sample))
            for i, tokens in enumerate(prompts())
            for sample in range(SAMPLED.samples_per_question)
        ]

    def generate(
        self, requests: list[Request], sampling: SamplingConfig, sampler: Sampler | None = None
    ) -> list[Rollout]:
        advanced: list[int] = []
        streamed: list[tuple[int, Rollout]] = []
        rollouts = (sampler or self.engine).generate(
            requests, sampling, advanced.append, lambda *one: streamed.append(one)
        )
        if sum(advanced) != len(requests) or not all(n > 0 for n in advanced):
            raise AssertionError(f"{len(requests)} requests, advanced by {advanced}")
        if not alike_on_all_ranks(rollouts):
            raise AssertionError("ranks got different rollouts")
        mine = json.dumps([index for index, _ in streamed]).encode()
        told = [json.loads(indices) for indices in all_gather_bytes(mine)]
        if sorted(index for indices in told for index in indices) != list(range(len(requests))):
            raise AssertionError(f"{len(requests)} requests, the ranks were told of {told}")
        if any(rollouts[index] != rollout for index, rollout in streamed):
            raise AssertionError("a rank was told another rollout than it was given")
        return rollouts

    def everywhere(self, name: str, value: Any) -> None:
        """Notes what each rank has to say."""
        self.found[name] = [json.loads(t) for t in all_gather_bytes(json.dumps(value).encode())]

    def sampling(self) -> None:
        """All at once over all engines; shuffled; and one by one, all on the first engine."""
        rollouts = self.generate(self.requests, SAMPLED)
        order = random.Random(1).sample(range(len(self.requests)), len(self.requests))
        shuffled = self.generate([self.requests[i] for i in order], SAMPLED)
        alone = [self.generate([request], SAMPLED)[0] for request in self.requests[:8]]
        self.found |= {
            "rollouts": [asdict(rollout) for rollout in rollouts],
            "shuffled": [shuffled[order.index(i)].tokens for i in range(len(order))],
            "alone": [rollout.tokens for rollout in alone],
            "nothing_asked": self.generate([], SAMPLED),
            "logprob_difference": logprob_differences(
                load(self.folder / "old"), self.requests, rollouts
            ),
        }

    def banked(self) -> None:
        """Sampled anew and banked; then by a bank that half is missing of; then by a whole one."""
        made = mkdtemp(prefix="bank_", dir=self.folder) if world_rank() == 0 else ""
        banks = Banks(Path(broadcast_bytes(made.encode()).decode()))
        header = RecordHeader(1, 0, 0, len(prompts()), SAMPLED.samples_per_question, "")
        asked = [Prompt(str(i), "", "", tokens) for i, tokens in enumerate(prompts())]
        found = []
        for _ in range(3):
            with banks.open(header, asked) as bank:
                sampler = BankedSampler(self.engine, bank)
                rollouts = self.generate(self.requests, SAMPLED, sampler)
            found.append([len(bank.entries), bank.problems, [asdict(r) for r in rollouts]])
            barrier()
            if len(found) == 1 and world_rank() == 0:
                (banks.folder / "iteration_000000.rank_00001").unlink()
            barrier()
        self.found["banked"] = found

    def greedy(self, weights: str) -> None:
        """Twice the same prompts, the second time from the prefix cache where that holds them."""
        requests = [Request(tokens, 0) for tokens in prompts()]
        rollouts = self.generate(requests * 2, GREEDY)
        model = load(self.folder / weights)
        self.found[f"greedy_{weights}"] = [rollout.tokens for rollout in rollouts]
        self.found[f"expected_{weights}"] = [greedy_tokens(model, r.tokens) for r in requests] * 2

    def push(self, weights: str, meddle: Meddle | None = None) -> None:
        """What a trainer streams, checked: whole tensors, tied ones once."""
        stream = whole_tensors(self.folder / weights, self.engine.receivers)
        route = WholeTensorRoute(stream, self.engine, "this is a test", meddle)
        WeightSync(route, "always").push()

    def rest(self, push: Callable[[], None]) -> None:
        """Sleeps, is given the first weights again by a push, and samples what it sampled first.

        Each step comes twice, and in between those that the state does not allow.
        """
        engine = self.engine
        first = engine.needs_weights
        for _ in range(2):
            engine.sleep()
        asleep = [engine.needs_weights, *map(refusal, (self._ask, engine.wake_cache))]
        for _ in range(2):
            engine.wake_weights()
        awake = [engine.needs_weights, *map(refusal, (self._ask, engine.wake_cache, engine.sleep))]
        push()
        engine.wake_cache()
        again = self.generate(self.requests, SAMPLED)
        self.found["rest"] = {
            "states": [first, asleep, awake, engine.needs_weights],
            "rollouts": [asdict(rollout) for rollout in again],
        }

    def unfilled(self) -> None:
        """What an engine that was started without weights says when it is asked."""
        self.found["unfilled"] = [self.engine.needs_weights, *refusal(self._ask)]

    def _ask(self) -> None:
        self.engine.generate(self.requests[:1], SAMPLED, lambda _: None)

    def refusals(self) -> None:
        too_long = [Request((3,) * WINDOW, 0)]
        self.found["too_long"] = refusal(lambda: self.engine.generate(too_long, SAMPLED, print))
        tensors = checkpoint(self.folder / "new")
        del tensors["model.norm.weight"]
        self.found["missing"] = refusal(lambda: self.engine.load_weights(iter(tensors.items())))


def refusal(call: Any) -> list[str]:
    try:
        call()
    except (UserError, ValueError, RuntimeError) as error:
        return [type(error).__name__, str(error)]
    return ["", "accepted"]


def flip_byte(name: str, piece: torch.Tensor) -> None:
    """Flips one byte of a tensor that has just arrived."""
    if name == "model.layers.1.mlp.down_proj.weight":
        piece.view(torch.uint8).view(-1)[0] ^= 1


def survey_of(folder: Path, rank: int) -> tuple[Survey, dict[str, torch.Tensor]]:
    """A policy that is all on one of the two ranks, and what this rank holds of it."""
    family, dims = read_model(folder)
    shapes = family.tensors(dims)
    specs = tuple(TensorSpec(name, shape, torch.float32) for name, shape in shapes.items())
    sources = [hf_regions(shapes) if rank == holder else [] for holder in range(2)]
    params = {name: tensor.clone() for name, tensor in checkpoint(folder).items()}
    return Survey(specs, sources, [0, 0]), params


def whole_tensors(folder: Path, receivers: Collection[int] | None) -> HfStream:
    """The policy of rank 1, so that what rank 0 receives has travelled."""
    found, params = survey_of(folder, rank=1)
    whole = hf_regions({spec.name: spec.shape for spec in found.tensors})
    targets = [whole if receivers is None or rank in receivers else [] for rank in range(2)]
    plan = make_plan(found.tensors, found.sources, targets, 1 << 16, found.nodes)
    rank = world_rank()
    sums = source_sums(found.tensors, found.sources, [whole], rank=rank, params=params)
    return HfStream(found.tensors, plan.summary(), tuple(plan.part_of(rank)), params, sums)
