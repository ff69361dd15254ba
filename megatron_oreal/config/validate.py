"""Rules across sections, and of a config against the world and the model it is to run on."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Protocol

from megatron_oreal.config.checks import require
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema_precision import ROLES
from megatron_oreal.config.stages import layers_of_stages

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config


def check_sections(config: Config) -> None:
    """Checks what sections demand of each other; `load_config` calls it.

    Raises:
        UserError: naming the first rule that is broken.
    """
    _check_window(config)
    _check_groups(config)
    _check_importance(config)
    _check_schedule(config)
    _check_evaluation(config)
    _check_replay(config)
    _check_fp8(config)
    verifier = config.verifier
    require(
        verifier.wall_deadline_s >= verifier.cpu_deadline_s,
        "verifier.wall_deadline_s",
        verifier.wall_deadline_s,
        f"set it to verifier.cpu_deadline_s ({verifier.cpu_deadline_s}) or above",
    )


def check_layout(config: Config, world_size: int) -> None:
    """Checks that the Megatron layout and the rollout engines fill `world_size` ranks.

    Raises:
        UserError: naming the degrees and WORLD_SIZE.
    """
    layout = config.parallel
    degrees = {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context}
    if world_size % prod(degrees.values()):
        shown = " * ".join(f"{name}({degree})" for name, degree in degrees.items())
        raise UserError(
            f"Invalid parallel dims: {shown} does not divide WORLD_SIZE({world_size}): "
            f"change parallel.* or start a multiple of {prod(degrees.values())} ranks"
        )
    check_engines(config, world_size)


def check_engines(config: Config, world_size: int) -> None:
    """Checks that the rollout engines fill `world_size` ranks.

    Raises:
        UserError: naming the engine's tensor parallelism and WORLD_SIZE.
    """
    if config.rollout.backend == "vllm_server":
        return  # they are not among these ranks
    engine = config.rollout.tensor_parallel
    require(
        world_size % engine == 0,
        "rollout.tensor_parallel",
        engine,
        f"does not divide WORLD_SIZE({world_size}); set a divisor of it",
    )


class ModelSizes(Protocol):
    """What of a model decides which layouts can cut it.

    Attributes:
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer; fewer than the tensor degree are held in copies.
        head_dim: rows of a head.
        ffn: rows of a layer's gate and of its up projection.
        layers: transformer layers.
        vocab: rows of the embedding, before any padding.
    """

    @property
    def heads(self) -> int: ...  # noqa: D102  in the class's docstring
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def ffn(self) -> int: ...  # noqa: D102
    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def vocab(self) -> int: ...  # noqa: D102


def check_model(config: Config, model: ModelSizes) -> None:
    """Checks that Megatron's and vLLM's layouts can cut this model.

    Raises:
        UserError: naming the degree and the size that it does not divide.
    """
    heads, kv_heads, vocab = model.heads, model.kv_heads, model.vocab
    qkv_rows = (heads + 2 * kv_heads) * model.head_dim
    tensor = {
        "parallel.tensor": config.parallel.tensor,
        "rollout.tensor_parallel": config.rollout.tensor_parallel,
    }
    for key, degree in tensor.items():
        fix = f"does not divide the model's {heads} attention heads; set a divisor of it"
        require(heads % degree == 0, key, degree, fix)
        fix = f"neither divides the model's {kv_heads} key-value heads nor is a multiple of them"
        whole = kv_heads % degree == 0 or degree % kv_heads == 0
        require(whole, key, degree, f"{fix}; set one that is")
        fix = f"more than the model's {vocab} vocabulary rows; set it lower"
        require(degree <= vocab, key, degree, fix)
        fix = f"does not divide the model's {model.ffn} feed-forward rows; set a divisor of it"
        require(model.ffn % degree == 0, key, degree, fix)
    degree = config.parallel.tensor
    fix = f"does not divide the {qkv_rows} rows of query, keys and values; set a divisor of it"
    require(qkv_rows % degree == 0, "parallel.tensor", degree, fix)
    _check_stages(config, model.layers)
    _check_bf16_layers(config, model.layers)


def _check_stages(config: Config, layers: int) -> None:
    parallel = config.parallel
    ends = {
        "parallel.first_stage_layers": parallel.first_stage_layers,
        "parallel.last_stage_layers": parallel.last_stage_layers,
    }
    given = " and ".join(f"{key}={held}" for key, held in ends.items() if held is not None)
    if not given:
        fix = f"does not divide the model's {layers} layers; set a divisor of it"
        require(layers % parallel.pipeline == 0, "parallel.pipeline", parallel.pipeline, fix)
    held = layers_of_stages(parallel, layers)
    fits = not given or (parallel.pipeline > 1 and min(held) > 0 and sum(held) == layers)
    fix = f"stages with {given} cannot share out the model's {layers} layers; change one of these"
    require(fits, "parallel.pipeline", parallel.pipeline, fix)
    virtual = parallel.virtual_pipeline
    for own in held:
        fix = f"does not divide the {own} layers of a pipeline rank; set a divisor of it"
        require(own % virtual == 0, "parallel.virtual_pipeline", virtual, fix)


def _check_bf16_layers(config: Config, layers: int) -> None:
    """Megatron-Core keeps at most one stage's layers at each end in bf16."""
    most = layers // config.parallel.pipeline
    for role in ROLES:
        chosen = config.fp8.role(role)
        for key in ("bf16_layers_at_start", "bf16_layers_at_end"):
            fix = f"a pipeline stage has {most} of the model's {layers} layers; set {most} or fewer"
            kept = getattr(chosen, key)
            require(kept <= most, f"fp8.{role}.{key}", kept, fix)


def _check_fp8(config: Config) -> None:
    delayed = config.fp8.reference.recipe == "delayed"
    fix = "learns its scales in passes with gradients, and the reference has none; set tensorwise"
    require(not delayed, "fp8.reference.recipe", "delayed", fix)
    for role in ROLES:
        recipe, precision = config.fp8.role(role).recipe, config.model.precision
        fix = f"rounds bf16 numbers, and model.precision={precision}; set that to bf16, or this"
        fits = recipe == "none" or precision == "bf16"
        require(fits, f"fp8.{role}.recipe", recipe, f"{fix} to none")


def _check_window(config: Config) -> None:
    sampling, budget = config.sampling, config.engine.tokens_per_micro_batch
    total = sampling.max_total_tokens
    require(
        sampling.max_new_tokens < total,
        "sampling.max_new_tokens",
        sampling.max_new_tokens,
        f"leaves no room for a prompt; set it below sampling.max_total_tokens ({total})",
    )
    require(
        budget >= total,
        "engine.tokens_per_micro_batch",
        budget,
        f"cannot hold one full sequence; set sampling.max_total_tokens ({total}) or more",
    )


def _check_groups(config: Config) -> None:
    samples, oreal = config.sampling.samples_per_question, config.oreal
    require(
        samples > 1,
        "sampling.samples_per_question",
        samples,
        f"oreal.shaping={oreal.shaping} compares the samples of a question; set 2 or more",
    )
    temperature = config.sampling.temperature
    require(
        temperature > 0,
        "sampling.temperature",
        temperature,
        "draws the same response each time; set a number above 0",
    )


def _check_importance(config: Config) -> None:
    sampling, level = config.sampling, config.oreal.importance.level
    for key in ("temperature", "top_p"):
        value = getattr(sampling, key)
        fix = f"oreal.importance.level={level} weighs samples of the policy itself; set 1"
        require(level == "none" or value == 1, f"sampling.{key}", value, f"{fix}, or level=none")


def _check_schedule(config: Config) -> None:
    schedule = config.schedule
    for key in ("freeze_iterations", "warmup_iterations"):
        value = getattr(schedule, key)
        fix = f"longer than the run; set schedule.iterations ({schedule.iterations}) or less"
        require(value <= schedule.iterations, f"schedule.{key}", value, fix)


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    wanted = evaluation.every > 0 or evaluation.at_start or evaluation.at_end
    require(
        evaluation.path is not None or not wanted,
        "evaluation.path",
        "null",
        "evaluation.every, at_start or at_end ask for held-out questions; name their file",
    )
    most = evaluation.samples_per_question
    require(
        max(evaluation.pass_at) <= most,
        "evaluation.pass_at",
        list(evaluation.pass_at),
        f"pass@k needs k samples; set k to evaluation.samples_per_question ({most}) or below",
    )


def _check_replay(config: Config) -> None:
    evaluation, replay = config.evaluation, config.rollout.replay
    wanted = evaluation.every > 0 or evaluation.at_start or evaluation.at_end
    require(
        replay is None or not wanted,
        "rollout.replay",
        replay,
        "starts no engine to evaluate with; set evaluation.every=0, at_start and at_end to false",
    )
