"""Megatron's data-parallel wrapper and AdamW, set up as the objective needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_oreal.config.schema import Config, OptimizerConfig
from megatron_oreal.models.build import PackedGPT
from megatron_oreal.models.settings import DTYPES


def wrap_for_training(stages: Sequence[PackedGPT], config: Config) -> list[DistributedDataParallel]:
    """Gives a model gradient buffers that are summed, in fp32, over the data-parallel ranks.

    `stages` are those that this rank has of it.
    """
    parallel = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = []
    for number, stage in enumerate(stages):
        # Each fills in what it left open.
        own = replace(settings, bucket_size=parallel.bucket_parameters)
        chunk = DistributedDataParallel(stage.config, own, stage, disable_bucketing=number > 0)
        _fuse_accumulation(stage)
        wrapped.append(chunk)
    if parallel.overlap_grad_reduce:
        # Else sums would begin with a step's first micro-batch.
        chunks: list[Any] = [chunk.no_sync for chunk in wrapped]
        settings_of_all: Any = stages[0].config
        settings_of_all.no_sync_func = chunks if len(chunks) > 1 else chunks[0]
    return wrapped


def _fuse_accumulation(stage: PackedGPT) -> None:
    """Lets matrices of Transformer Engine add their gradients to Megatron's buffers themselves.

    Megatron's own switch would ask for apex as well, on account of the output layer.
    """
    for module in stage.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # pyright: ignore[reportArgumentType]  a switch


def finish_gathers(chunk: DistributedDataParallel) -> None:
    """Waits until all weights are there that other ranks stepped; collective over these.

    Does nothing where they are, or where `step` itself has waited.
    """
    if not chunk.use_forward_hook:
        return
    for group in chunk.bucket_groups:
        if not group.param_gather_dispatched:
            group.start_param_sync()
    for group in chunk.bucket_groups:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel], optimizer: OptimizerConfig, config: Config
) -> MegatronOptimizer:
    """Returns AdamW over this rank's parameters or its share of them; collective over the world.

    `wrapped` are the stages of the model that this rank has.
    """
    precision = config.model.precision
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision == "bf16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    # No overrides: weight decay falls on norms and biases too, as in the reference.
    chunks: list[Any] = list(wrapped)
    return get_megatron_optimizer(settings, chunks, config_overrides={})


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Sets the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Returns the norm of the gradient that the next `step` would clip; changes no weight.

    Collective over the ranks that share the model. Without a loss scale, which bf16 and fp32 have
    none of, `step` may prepare the same gradients once more.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm() or 0)
