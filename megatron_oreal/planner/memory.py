"""Bytes on the fullest GPU of a layout, by part and phase; docs/planner.md derives each line.

Models and optimizers stay on the GPU in every phase, but for what `offload.*` names. What a phase
adds is the engine, activations and the head's buffers, or the engine's weights and others on their
way to them: while models train the engine sleeps, but for its CUDA graphs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.config.head_chunks import logit_bytes, most_chunk_tokens
from megatron_oreal.config.stages import layers_of_stages
from megatron_oreal.planner.activations import LayerActivations
from megatron_oreal.planner.hardware import GIB
from megatron_oreal.planner.models import (
    MOMENTS,
    Parts,
    Phase,
    model_copies,
    resident_models,
    stepping_optimizer,
)
from megatron_oreal.planner.sizes import (
    FP32,
    Dims,
    element_bytes,
    engine_copies,
    engine_parameters,
    layer_matrices,
    parameters,
)

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config
    from megatron_oreal.planner.hardware import Cluster, Gpu

SAMPLER = 24  # bytes a logit of a sampled step: fp32 copies, sorted values and their places
GRAPHS = GIB  # CUDA graphs of an engine
RESERVE = 4 * GIB  # CUDA's context, communicators of NCCL, fragments
PREFILL_TOKENS = 8192  # at least so many prompt tokens in a step of an engine
_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """`phases[phase][part]` in bytes, on a rank of the pipeline stage that needs the most."""

    gpu: Gpu
    stage: int
    phases: dict[Phase, Parts]
    kv_tokens: int
    longest: int

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes in that phase."""
        return self.total(self.peak_phase)

    @property
    def fits(self) -> bool:
        """Whether every phase fits the GPU and an engine can hold one sequence of full length."""
        return self.peak <= self.gpu.memory and self.kv_tokens >= self.longest

    def total(self, phase: Phase) -> int:
        """Bytes of all parts in a phase."""
        return sum(self.phases[phase].values())


def planned_phases(memory: Memory, *, sleeps: bool) -> dict[str, int]:
    """Returns the most that a device may hold at the end of each phase that a run names; pure.

    Phases that train follow each other without giving memory back: each may leave the most of all.
    A sync ends with the engine awake.
    """
    trains = max(
        memory.total(phase) for phase in memory.phases if phase not in ("generate", "sync")
    )
    awake = max(memory.total("generate"), memory.total("sync"))
    rests = {part: size for part, size in memory.phases["sync"].items() if part != "staging"}
    if sleeps:
        del rests["engine weights"]
    return {
        **dict.fromkeys(("generate", "evaluate", "sync"), awake),
        **dict.fromkeys(("check", "token_rm", "reference", "importance", "policy"), trains),
        "sleep": sum(rests.values()),
    }


def plan_memory(config: Config, dims: Dims, cluster: Cluster) -> Memory:
    """Returns the memory of the pipeline stage that needs the most; pure.

    Args:
        config: The run; its layout divides the cluster and the model.
        dims: The model's dimensions.
        cluster: The GPUs of the run.
    """
    stages = range(config.parallel.pipeline)
    found = [plan_stage(config, dims, cluster, stage) for stage in stages]
    return max(found, key=lambda memory: memory.peak)


def data_parallel(config: Config, ranks: int) -> int:
    """How many groups of ranks work on micro-batches of their own."""
    return model_copies(config, ranks) // config.parallel.context


def trained_models(config: Config) -> int:
    """How many models have an optimizer: the policy, and the token_rm where there is one."""
    return 1 if config.oreal.token_weights.kind == "none" else 2


def checkpoint_bytes(config: Config, dims: Dims) -> int:
    """Bytes of one checkpoint: weights and both moments of what is trained, in fp32."""
    return trained_models(config) * (FP32 + MOMENTS) * parameters(dims)


def kv_bytes(config: Config, dims: Dims) -> int:
    """Bytes that one token takes in the cache of one rank of an engine."""
    rows = math.ceil(dims.kv_heads / config.rollout.tensor_parallel) * dims.head_dim
    size = element_bytes(config) if config.rollout.kv_cache_dtype == "auto" else 1
    return 2 * dims.layers * rows * size


def plan_stage(config: Config, dims: Dims, cluster: Cluster, stage: int) -> Memory:
    """Returns the memory of one rank of a pipeline stage; pure."""
    engine, kv_tokens = _engine(config, dims, cluster.gpu)
    # Asleep, an engine keeps its CUDA graphs alone.
    asleep = {"CUDA graphs": engine["CUDA graphs"]} if config.rollout.sleep else engine
    place = (config, dims, cluster.ranks, stage)
    layer = LayerActivations(config, dims, cluster.modules)
    layers = layers_of_stages(config.parallel, dims.layers)[stage]
    last = stage == config.parallel.pipeline - 1
    kept = math.ceil(layer.kept * layers * _in_flight(config, stage))
    kept += layer.last_norm if last else 0

    def models(phase: Phase) -> Parts:
        return resident_models(*place, phase) | {"reserve": RESERVE}

    def runs(phase: Phase, activations: int, at_work: int, head: int) -> Parts:
        # The head's buffers are gone when layers run backward: of the two the larger counts.
        larger = max(0, at_work - head)
        parts = {"activations": activations, "head": head, "layer at work": larger}
        # All of these are gone when the optimizer comes.
        step = max(0, stepping_optimizer(*place, phase) - sum(parts.values()))
        return models(phase) | asleep | parts | ({"optimizer at its step": step} if step else {})

    scored, trained = (_head(config, dims, last, trains=trains) for trains in (False, True))
    phases: dict[Phase, Parts] = {
        "generate": models("generate") | engine,
        "reference": runs("reference", 0, layer.forward, scored),
        "token_rm": runs("token_rm", kept, layer.backward, _scalar_head(config, dims, last)),
        "policy": runs("policy", kept, layer.backward, trained),
        "sync": models("sync")
        | asleep
        | {"engine weights": engine["engine weights"], "staging": _staging(config)},
    }
    if config.oreal.token_weights.kind == "none":
        del phases["token_rm"]
    return Memory(cluster.gpu, stage, phases, kv_tokens, config.sampling.max_total_tokens)


def _in_flight(config: Config, stage: int) -> float:
    """Micro-batches whose activations a stage holds at a time, all of its layers' or a share.

    Of an interleaved pipeline a virtual stage holds a share of the layers, of more micro-batches.
    """
    layout = config.parallel
    if layout.virtual_pipeline == 1:
        return layout.pipeline - stage
    ahead = 2 * (layout.pipeline - stage - 1) + (layout.virtual_pipeline - 1) * layout.pipeline
    return (ahead + 1) / layout.virtual_pipeline


def _head(config: Config, dims: Dims, last: bool, *, trains: bool) -> int:
    """The language-model head: hidden states of all tokens and those scored, a chunk's logits.

    When it trains, the gradients of what it scored and of its weight as well.
    """
    if not last:
        return 0
    size, tensor = element_bytes(config), config.parallel.tensor
    tokens = config.engine.tokens_per_micro_batch / config.parallel.context
    words = math.ceil(dims.vocab / tensor)
    chunk = min(tokens, most_chunk_tokens(config, words))
    held = 2 * tokens * dims.hidden * size + chunk * words * logit_bytes(config)
    if trains:
        sums = FP32 if config.engine.head_grad_fp32 else size
        held += tokens * dims.hidden * size + words * dims.hidden * sums
    return math.ceil(held)


def _scalar_head(config: Config, dims: Dims, last: bool) -> int:
    """The token reward model's head scores hidden states in fp32: a copy of them in bf16."""
    if not last or element_bytes(config) == FP32:
        return 0
    shared = config.parallel.tensor if config.parallel.sequence_parallel else 1
    tokens = config.engine.tokens_per_micro_batch / config.parallel.context
    return math.ceil(FP32 * tokens * dims.hidden / shared)


def engine_parts(config: Config, dims: Dims) -> Parts:
    """What an engine takes on a GPU besides its cache."""
    rollout, size = config.rollout, element_bytes(config)
    prefill = max(config.sampling.max_total_tokens, PREFILL_TOKENS)
    a_token = 4 * dims.hidden + 3 * dims.ffn // rollout.tensor_parallel
    return {
        "engine weights": _engine_weights(config, dims),
        "engine work space": size * a_token * prefill
        + SAMPLER * rollout.max_sequences * dims.vocab,
        "CUDA graphs": 0 if rollout.enforce_eager else GRAPHS,
    }


def _engine(config: Config, dims: Dims, gpu: Gpu) -> tuple[Parts, int]:
    """An engine takes its share of the GPU; what its parts leave of that is its cache."""
    share = int(config.rollout.gpu_memory_utilization * gpu.memory)
    parts = engine_parts(config, dims)
    cache = max(0, share - sum(parts.values()))
    return parts | {"KV cache": cache}, cache // kv_bytes(config, dims)


def _engine_weights(config: Config, dims: Dims) -> int:
    """Quantised, the matrices of the layers have one byte an element and nothing else has."""
    tensor = config.rollout.tensor_parallel
    weights = element_bytes(config) * engine_parameters(dims, tensor)
    if config.rollout.quantization == "none":
        return weights
    matrices = dims.layers * layer_matrices(dims, tensor, engine_copies(dims, tensor))
    return weights - (element_bytes(config) - 1) * matrices


def _staging(config: Config) -> int:
    """Packed buffers out and in: weights go straight into the engine's, a round at a time."""
    return 2 * config.rollout.sync_round_mib * _MIB
