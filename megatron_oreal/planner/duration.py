"""Seconds of an iteration by phase, from floating-point operations and bytes; see docs/planner.md.

Nothing here was fitted to a run of OREAL: `Assumptions` holds what is taken for granted.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

from megatron_oreal.config.schema_precision import ROLES
from megatron_oreal.planner.hardware import GPUS_PER_NODE
from megatron_oreal.planner.memory import (
    checkpoint_bytes,
    data_parallel,
    kv_bytes,
)
from megatron_oreal.planner.models import model_copies
from megatron_oreal.planner.sizes import (
    FP32,
    Dims,
    element_bytes,
    engine_parameters,
    parameters,
    stage_parameters,
    vocabulary_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.config.schema import Config
    from megatron_oreal.config.schema_precision import Fp8Recipe, Role
    from megatron_oreal.planner.hardware import Cluster, Gpu

# Layers in FP8 against bf16, forward and backward: measured over four of the 32B shape, on one H100
# with TE 2.20. Of mxfp8 nothing was measured.
FP8_SPEED: dict[Fp8Recipe, float] = {
    "none": 1.0,
    "delayed": 316 / 206,
    "tensorwise": 316 / 210,
    "blockwise": 316 / 242,
    "mxfp8": 1.0,
}
STEP = 3  # a forward and a backward pass cost three forward passes
GOLDEN = 0.618034  # its multiples, modulo 1, spread evenly and in no order


@dataclass(frozen=True)
class Assumptions:
    """What no configuration says; shares are of the hardware's figures."""

    prompt_tokens: int = 300
    mean_response_tokens: float = 4667.0
    length_sigma: float = 0.7  # of the logarithm of a response's length, before it is cut
    mixed_questions: float = 0.8  # share of questions neither solved nor failed throughout
    decode_share: float = 0.45  # measured at 7B on one H100: 21,000 tokens/s at 256 sequences
    train_share: float = 0.4  # of the peak; 0.79 was measured in four layers on one H100
    packing_share: float = 0.9  # of a micro-batch's tokens that are not padding
    network_share: float = 0.7
    reduce_s: float = 15e-6  # one all-reduce of a decoding step within NVLink
    seed_s: float = 20e-6  # one response's own seed in a step: vLLM draws for one after another
    verify_s: float = 0.2  # one answer in one worker
    storage: float = 2e9  # bytes per second that all ranks together write
    start_s: float = 300.0  # imports, weights, compilation, CUDA graphs


@dataclass(frozen=True)
class Duration:
    """Seconds of the phases of an iteration that trains the policy, and of one that does not."""

    phases: dict[str, float]
    frozen: dict[str, float]
    frozen_iterations: int
    iterations: int
    start: float
    checkpoints: float
    slots: int
    tokens: float  # of all responses of an iteration

    @property
    def iteration(self) -> float:
        """Seconds of an iteration that trains the policy."""
        return sum(self.phases.values())

    @property
    def run(self) -> float:
        """Seconds of the whole run, without evaluations."""
        trained = self.iterations - self.frozen_iterations
        trained_s = trained * self.iteration + self.frozen_iterations * sum(self.frozen.values())
        return self.start + trained_s + self.checkpoints


def assumptions_for(config: Config, mean_response_tokens: float | None = None) -> Assumptions:
    """Returns the defaults; a response has a third of its limit on average, unless it is known."""
    mean = mean_response_tokens or config.sampling.max_new_tokens / 3
    return Assumptions(mean_response_tokens=mean)


def plan_duration(
    config: Config, dims: Dims, cluster: Cluster, kv_tokens: int, given: Assumptions
) -> Duration:
    """Returns how long an iteration takes on a layout that fits; pure.

    Args:
        config: The run.
        dims: The model's dimensions.
        cluster: The GPUs of the run.
        kv_tokens: Tokens that an engine's cache holds.
        given: What is taken for granted.
    """
    engines = cluster.ranks // config.rollout.tensor_parallel
    responses = config.data.questions_per_iteration * config.sampling.samples_per_question
    lengths = response_lengths(math.ceil(responses / engines), config, given)
    mean = sum(lengths) / len(lengths)
    at_once = int(kv_tokens / (given.prompt_tokens + mean))
    slots = max(1, min(config.rollout.max_sequences, at_once))
    policy, reference, token_rm = (
        _passes(config, dims, cluster, lengths, _multiplying(config, role, given)) for role in ROLES
    )
    step = STEP + (config.engine.recompute != "none")  # most of a pass lies in what is recomputed
    workers = cluster.ranks * config.verifier.workers_per_rank
    reduced = _gradients(config, dims, cluster, given)
    phases = {
        "generate": decode_seconds(lengths, slots, _Step(config, dims, cluster.gpu, given)),
        "verify": math.ceil(responses / workers) * given.verify_s,
        "reference": reference,
        "token_rm": step * token_rm + reduced,
        "policy": step * policy + reduced,
        "sync": _sync(config, dims, cluster.gpu, given),
    }
    if config.oreal.token_weights.kind == "none":
        del phases["token_rm"]
    if config.oreal.importance.level != "none":
        phases["importance"] = policy
    frozen = phases | {"policy": policy}
    if not config.rollout.sleep:  # what slept has lost its weights, trained or not
        frozen["sync"] = 0.0
    schedule = config.schedule
    return Duration(
        phases=phases,
        frozen=frozen,
        frozen_iterations=schedule.freeze_iterations,
        iterations=schedule.iterations,
        start=given.start_s,
        checkpoints=_checkpoints(config, dims) / given.storage,
        slots=slots,
        tokens=responses * mean,
    )


def _multiplying(config: Config, role: Role, given: Assumptions) -> Assumptions:
    """Returns the share of the bf16 peak that a model's layers reach with its recipe."""
    return replace(given, train_share=given.train_share * FP8_SPEED[config.fp8.role(role).recipe])


def _checkpoints(config: Config, dims: Dims) -> int:
    """Bytes of all checkpoints of a run."""
    every = config.checkpoint.every
    count = math.ceil(config.schedule.iterations / every) if every else 0
    return count * checkpoint_bytes(config, dims)


def response_lengths(count: int, config: Config, given: Assumptions) -> list[float]:
    """Returns evenly spaced quantiles of a log-normal length, cut at the limit; the mean before."""
    sigma, most = given.length_sigma, config.sampling.max_new_tokens
    mu = math.log(given.mean_response_tokens) - sigma**2 / 2
    normal = NormalDist(mu, sigma)
    return [min(most, math.exp(normal.inv_cdf((i + 0.5) / count))) for i in range(count)]


class _Step:
    """Seconds of one decoding step of an engine: what it reads, computes and reduces."""

    def __init__(self, config: Config, dims: Dims, gpu: Gpu, given: Assumptions) -> None:
        tensor = config.rollout.tensor_parallel
        count = engine_parameters(dims, tensor) - vocabulary_parameters(dims, tensor)
        share = given.decode_share
        self.weights = count * element_bytes(config) / (gpu.bandwidth * share)
        self.a_kv_token = kv_bytes(config, dims) / (gpu.bandwidth * share)
        self.a_sequence = 2 * count / (gpu.flops * share)
        self.prompt, self.seed = given.prompt_tokens, given.seed_s
        self.reduce = 2 * dims.layers * given.reduce_s if tensor > 1 else 0.0

    def seconds(self, sequences: int, kv_tokens: float) -> float:
        """Returns the slower of memory and arithmetic, then reductions and draws."""
        reading = self.weights + self.a_kv_token * kv_tokens
        return max(reading, self.a_sequence * sequences) + self.reduce + self.seed * sequences


def decode_seconds(lengths: Sequence[float], slots: int, step: _Step) -> float:
    """Follows one engine from one finished response to the next, `slots` of them at a time.

    The tail is in it: when few long responses are left, a step takes nearly as long as with many.
    Who waits for a place does so in an order that knows nothing of lengths.
    """
    waiting = [lengths[i] for i in sorted(range(len(lengths)), key=lambda i: i * GOLDEN % 1)]
    running: list[tuple[float, float]] = []  # (step at which it ends, step at which it began)
    now = seconds = 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, (now + waiting.pop(), now))
        end = running[0][0]
        middle = (now + end) / 2
        cached = sum(step.prompt + middle - began for _, began in running)
        seconds += (end - now) * step.seconds(len(running), cached)
        now = end
        heapq.heappop(running)
    return seconds


def _passes(
    config: Config,
    dims: Dims,
    cluster: Cluster,
    lengths: Sequence[float],
    given: Assumptions,
) -> float:
    """Seconds of one forward pass over all trajectories, the pipeline's bubble included."""
    layout = config.parallel
    whole = [given.prompt_tokens + length for length in lengths]
    mean = sum(whole) / len(whole)
    reach = sum(length**2 for length in whole) / sum(whole)  # of a token's own sequence
    tokens = _trajectories(config, given) * mean
    a_batch = config.engine.tokens_per_micro_batch * given.packing_share
    batches = max(1, math.ceil(tokens / a_batch / data_parallel(config, cluster.ranks)))
    matrices = parameters(dims) - (0 if dims.tied_embeddings else vocabulary_parameters(dims))
    a_token = 2 * matrices + 2 * dims.query_rows * reach * dims.layers
    share = layout.tensor * layout.pipeline * layout.context
    a_stage = a_token * a_batch / share / (cluster.gpu.flops * given.train_share)
    a_stage += _exchange(config, dims, cluster.gpu, given) * a_batch / layout.context
    return (batches + (layout.pipeline - 1) / layout.virtual_pipeline) * a_stage


def _exchange(config: Config, dims: Dims, gpu: Gpu, given: Assumptions) -> float:
    """Seconds that the layers of a stage exchange one token of a rank, forward.

    Tensor parallelism gathers hidden states before two matrices and sums them up after two others;
    context parallelism hands keys and values to the other ranks of its group.
    """
    layout, size = config.parallel, element_bytes(config)
    summed = 4 * dims.hidden * (layout.tensor - 1) / layout.tensor
    handed = 2 * dims.kv_rows / layout.tensor * (layout.context - 1)
    in_node = layout.tensor * layout.context <= GPUS_PER_NODE
    seconds = summed / gpu.link + handed / (gpu.link if in_node else gpu.network)
    return size * seconds * dims.layers / layout.pipeline / given.network_share


def _trajectories(config: Config, given: Assumptions) -> float:
    questions, samples = config.data.questions_per_iteration, config.sampling.samples_per_question
    kept = {
        "pairs": 2 * given.mixed_questions,
        "all_nontrivial": samples * given.mixed_questions,
        "all": samples,
    }
    return questions * kept[config.oreal.selection]


def _gradients(config: Config, dims: Dims, cluster: Cluster, given: Assumptions) -> float:
    """Seconds to sum the gradients over data-parallel ranks and to gather the weights again."""
    copies, layout = model_copies(config, cluster.ranks), config.parallel
    count = stage_parameters(dims, layout, 0, "vocab")
    nbytes = count * (FP32 + element_bytes(config)) * (copies - 1) / copies
    return nbytes / (cluster.gpu.network * given.network_share)


def _sync(config: Config, dims: Dims, gpu: Gpu, given: Assumptions) -> float:
    """Seconds until every engine's live parameters are the policy's.

    A node holds a stage or more and receives the rest once, over all its network cards; each rank
    of an engine then gets its part, over NVLink, and writes it.
    """
    nbytes = parameters(dims) * element_bytes(config)
    part = nbytes / config.rollout.tensor_parallel
    layout = config.parallel
    stages = min(layout.pipeline, max(1, GPUS_PER_NODE // layout.tensor))
    lacking = nbytes * (1 - stages / layout.pipeline)
    across = lacking / (GPUS_PER_NODE * gpu.network * given.network_share)
    within = part / (gpu.link * given.network_share)
    return across + within + part / (gpu.bandwidth * given.decode_share)
