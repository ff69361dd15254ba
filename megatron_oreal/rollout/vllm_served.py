"""What a rollout server says of itself beyond vLLM's own routes; vLLM mixes it into its workers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from megatron_oreal.models.registry import read_model
from megatron_oreal.weights.in_place import answered_sums
from megatron_oreal.weights.vllm_layout import LiveShard, difference

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from megatron_oreal.rollout.vllm_transfer import GlooEngine

QUALIFIED_NAME = "megatron_oreal.rollout.vllm_served.ServedModel"


class ServedModel:
    """Methods that `collective_rpc` can call by name, in each worker of a server."""

    def oreal_describe(self) -> dict[str, Any]:
        """Returns what trainer and server must agree in, see `server_client.check_server`."""
        config: VllmConfig = self.vllm_config  # pyright: ignore[reportAttributeAccessIssue]
        transfer = config.weight_transfer_config
        return {
            "model": config.model_config.hf_config.to_dict(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "max_model_len": config.model_config.max_model_len,
            "logprobs_mode": config.model_config.logprobs_mode,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "weight_transfer": transfer.backend if transfer else None,
        }

    def oreal_life(self) -> str:
        """Returns a name that this worker has until it ends, and no other ever."""
        if not hasattr(self, "_oreal_life"):
            self._oreal_life = uuid4().hex
        return self._oreal_life

    def oreal_differing(self, expected: str) -> list[str]:
        """Returns the names of tensors that did not arrive as expected, JSON `{name: checksum}`."""
        engine = cast("GlooEngine", self.weight_transfer_engine)  # pyright: ignore[reportAttributeAccessIssue]
        return engine.differing(json.loads(expected))

    def oreal_sums(self) -> dict[str, int]:
        """Returns the checksums of what this worker answers for of its plain live parameters.

        Raises:
            ValueError: They are not plain; names one.
        """
        config: VllmConfig = self.vllm_config  # pyright: ignore[reportAttributeAccessIssue]
        parameters = dict(self.get_model().named_parameters())  # pyright: ignore[reportAttributeAccessIssue]
        size = config.parallel_config.tensor_parallel_size
        live = LiveShard(parameters, config.parallel_config.rank % size, size)
        family, dims = read_model(config.model_config.model)
        dtypes = dict.fromkeys(family.tensors(dims), config.model_config.dtype)
        if why := difference(live, family, dims, dtypes):
            raise ValueError(f"not checked: {why}")
        return answered_sums(family, dims, live)
