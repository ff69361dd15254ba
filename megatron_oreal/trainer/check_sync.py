"""`megatron-oreal check-sync`: the policy's weights arrive in the engines and score alike there.

1. Before any step the policy is the reference: the same log-probabilities to the last bit, KL 0.
2. The policy's weights are scaled, so that an engine which kept the checkpoint's would show.
3. They are pushed, which compares checksums of what left and what was handed over, then read back
   whole from what the engines compute with.
4. The engines answer probe questions; policy and engines must score these answers alike.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from megatron_oreal.algorithm.kl import k3
from megatron_oreal.algorithm.rollout_diagnostics import mismatch_metrics
from megatron_oreal.config.schema import Config
from megatron_oreal.engine.roles import Policy, Reference
from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.parallel.collectives import all_gather_bytes, world_rank
from megatron_oreal.rollout.engine import RolloutEngine
from megatron_oreal.rollout.groups import build_requests
from megatron_oreal.rollout.vllm_inprocess import VllmInProcess
from megatron_oreal.trainer.models import ModelSource, open_source
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.probe import unjudged
from megatron_oreal.trainer.setup import read_texts, start_engine
from megatron_oreal.types import PackedBatch, Prompt
from megatron_oreal.weights.bridge import HfStream
from megatron_oreal.weights.sums import Checksums

PROBES = 8
SCALE = 1 + 2**-7  # the smallest that changes every number of bf16 but zero


@dataclass(frozen=True)
class SyncReport:
    """What was found, alike on every rank.

    Attributes:
        route: how weights reach the engines.
        reference_difference_max: largest difference of policy and reference on a token, nats.
        kl_k3: mean over tokens of the divergence from the reference.
        tensors: checksum of each Hugging Face tensor that was pushed.
        differing: tensors that an engine computes with otherwise, and on which ranks.
        probe_tokens: how many the engines sampled.
        mismatch_mean: of engines and policy on these tokens, nats.
        mismatch_max: likewise.
        mismatch_bound: `rollout.max_mean_logprob_difference`.
    """

    route: str
    reference_difference_max: float
    kl_k3: float
    tensors: dict[str, int]
    differing: dict[str, list[int]]
    probe_tokens: int
    mismatch_mean: float
    mismatch_max: float
    mismatch_bound: float

    @property
    def passed(self) -> bool:
        """Whether a run may start from here."""
        alike = self.reference_difference_max == self.kl_k3 == 0
        return alike and not self.differing and self.mismatch_mean <= self.mismatch_bound


def check_sync(config: Config, *, as_json: bool) -> bool:
    """Prints what was found, on rank 0, and says whether all is well; collective over the world.

    Raises:
        UserError: Bad input, on every rank alike.
        RuntimeError: A tensor changed on its way or did not take effect; names it.
    """
    texts = read_texts(config, training=True)
    source = open_source(config)
    policy = Policy(source.dims, config, source.topology, source.load, config.policy_optimizer)
    reference = Reference(source.dims, config, source.topology, source.load)
    with contextlib.closing(start_engine(config, texts)) as engine:
        prompts = texts.training[:PROBES]
        difference, kl = _compare_with_reference(source, policy, reference, engine, prompts)
        with torch.no_grad():
            for parameter in policy.model.parameters().values():
                parameter.mul_(SCALE)
        sync = source.weight_sync(policy, engine)
        sync.push(check=True)
        tensors, differing = _read_back(source.stream(policy), engine)
        batch = _probe(source, engine, prompts)
        mismatch = mismatch_metrics(policy.logprobs(batch).logprobs, _sampled(batch))
    report = SyncReport(
        route=sync.description,
        reference_difference_max=difference,
        kl_k3=kl,
        tensors=tensors,
        differing=differing,
        probe_tokens=sum(t.response_length for t in batch.trajectories),
        mismatch_mean=mismatch["rollout/mismatch_mean"],
        mismatch_max=mismatch["rollout/mismatch_max"],
        mismatch_bound=config.rollout.max_mean_logprob_difference,
    )
    if world_rank() == 0:
        _print(report, as_json=as_json)
    return report.passed


def _compare_with_reference(
    source: ModelSource,
    policy: Policy,
    reference: Reference,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
) -> tuple[float, float]:
    """Returns the largest difference of a token and the mean k3; collective over the world."""
    batch = _probe(source, engine, prompts)
    ours, theirs = (torch.cat(role.logprobs(batch).logprobs) for role in (policy, reference))
    return float((ours - theirs).abs().max()), float(k3(ours, theirs).mean())


def _probe(source: ModelSource, engine: RolloutEngine, prompts: Sequence[Prompt]) -> PackedBatch:
    """Samples one answer to each question, packed for the policy; the engines sleep then.

    Collective over the world.
    """
    config = source.config
    requests = build_requests(prompts, 1, config.run.seed, iteration=0)
    rollouts = engine.generate(requests, config.sampling, lambda _: None)
    engine.sleep()
    trajectories = [unjudged(*answered) for answered in zip(prompts, rollouts, strict=True)]
    tokens = config.engine.tokens_per_micro_batch
    return Packer.for_layout(source.topology, tokens).pack(trajectories)


def _read_back(stream: HfStream, engine: RolloutEngine) -> tuple[Checksums, dict[str, list[int]]]:
    """Returns the checksums of what was pushed, and what differs on which ranks.

    Collective over the world. A server reads its weights back itself, in the checked push.
    """
    names = engine.differing(stream.full_tensors()) if isinstance(engine, VllmInProcess) else []
    return stream.checksums(), _differing(names)


def _sampled(batch: PackedBatch) -> list[torch.Tensor]:
    return [torch.tensor(trajectory.rollout_logprobs) for trajectory in batch.trajectories]


def _differing(names: Sequence[str]) -> dict[str, list[int]]:
    """Returns what differs on any rank, and on which; collective over the world."""
    found: dict[str, list[int]] = {}
    for rank, payload in enumerate(all_gather_bytes(msgspec.json.encode(names))):
        for name in msgspec.json.decode(payload, type=list[str]):
            found.setdefault(name, []).append(rank)
    return found


def _print(report: SyncReport, *, as_json: bool) -> None:
    console = Console()
    if as_json:
        record = {"passed": report.passed, **asdict(report)}
        console.print(to_json(record), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(_table(report))
    for name, ranks in report.differing.items():
        console.print(f"{name} differs on ranks {ranks}", markup=False, highlight=False)
    found = {
        "weights reach the engines": report.route,
        "policy and reference, largest difference": f"{report.reference_difference_max:.2g} nats",
        "KL to the reference, k3": f"{report.kl_k3:.2g}",
        f"policy and engines on {report.probe_tokens} sampled tokens": (
            f"mean {report.mismatch_mean:.2g}, largest {report.mismatch_max:.2g} nats"
            f" (bound of the mean: {report.mismatch_bound:g})"
        ),
        "weight sync": "as it should be" if report.passed else "NOT as it should be",
    }
    for what, value in found.items():
        console.print(f"{what}: {value}", markup=False, highlight=False, soft_wrap=True)


def _table(report: SyncReport) -> Table:
    """Draws a row for each kind of tensor, the layers of one kind together."""
    table = Table(title="weights pushed and read back")
    table.add_column("tensor", overflow="fold")
    for column in ("layers", "differing", "checksum, all layers"):
        table.add_column(column, justify="right")
    kinds = {name: re.sub(r"\.\d+\.", ".*.", name) for name in report.tensors}
    layers, differing = Counter(kinds.values()), Counter(kinds[n] for n in report.differing)
    sums: Counter[str] = Counter()
    for name, checksum in report.tensors.items():
        sums[kinds[name]] += checksum
    for kind, count in layers.items():
        checksum = f"{sums[kind] % (1 << 64):016x}"
        table.add_row(kind, str(count), str(differing[kind]), checksum)
    return table
