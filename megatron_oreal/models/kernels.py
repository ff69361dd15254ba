"""Which libraries of fused kernels this rank's layers can be made of."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_oreal.config.device import Device
from megatron_oreal.config.schema import Precision
from megatron_oreal.parallel.cuda_on_cpu import has_gpu

# Apex's extension of the matrix product that adds a weight's gradient into the main gradient.
_ACCUMULATING_PRODUCT = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True)
class Kernels:
    """What is at hand on this rank: a GPU and, on it, Transformer Engine and apex's product."""

    gpu: bool = False
    transformer_engine: bool = False
    apex: bool = False


@functools.cache
def kernels_here() -> Kernels:
    """Looks once, without importing either library; not collective."""
    gpu = has_gpu()
    return Kernels(
        gpu,
        transformer_engine=gpu and importlib.util.find_spec("transformer_engine") is not None,
        apex=gpu and importlib.util.find_spec(_ACCUMULATING_PRODUCT) is not None,
    )


def kernels_for(precision: Precision) -> Kernels:
    """Returns what layers of this precision are made of here; not collective.

    TE attends to packed sequences in bf16 alone: fp32 is plain torch on a GPU as well.
    """
    here = kernels_here()
    return replace(here, transformer_engine=here.transformer_engine and precision == "bf16")


def device_here() -> Device:
    """Returns what this rank computes on; not collective."""
    try:
        engine = version("transformer-engine")
    except PackageNotFoundError:
        engine = None
    if not has_gpu():
        return Device("a CPU", transformer_engine=engine)
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), engine)
