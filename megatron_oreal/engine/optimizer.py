"""Megatron's data-parallel wrapper and AdamW, set up as the objective needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_oreal.config.schema import Config, OptimizerConfig
from megatron_oreal.models.build import DTYPES, PackedGPT


def wrap_for_training(module: PackedGPT, config: Config) -> DistributedDataParallel:
    """Gives the model gradient buffers that are summed, in fp32, over the data-parallel ranks."""
    return DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        module,
    )


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
