"""Tells vLLM of the weight-transfer engine of this package; an entry point of the package."""

from __future__ import annotations

BACKEND = "megatron_oreal"
"""The name of `vllm_transfer.GlooEngine` in `--weight-transfer-config`."""

TRANSFERS = {"gloo": BACKEND, "nccl": "nccl"}
"""vLLM's name of the engine for each `rollout.server_transfer`; `nccl` is its own."""


def register() -> None:
    """Adds the engine to vLLM's table; vLLM calls it in each of its processes, perhaps twice."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        module = "megatron_oreal.rollout.vllm_transfer"
        WeightTransferEngineFactory.register_engine(BACKEND, module, "GlooEngine")
