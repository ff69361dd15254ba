"""How vLLM is started, in the training ranks or as a server: pure, and alike for both."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, Literal

from megatron_oreal.parallel.cuda_on_cpu import has_gpu
from megatron_oreal.rollout.vllm_plugin import TRANSFERS
from megatron_oreal.rollout.vllm_served import QUALIFIED_NAME

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config, Precision, RolloutConfig

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
DTYPES: dict[Precision, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}

_GIB = 1 << 30
_NO_SHARE = 0.01
_PREFILL_TOKENS = 8192  # at least so many prompt tokens a step


def engine_arguments(
    model_path: str,
    config: RolloutConfig,
    precision: Precision,
    max_total_tokens: int,
    logprobs_mode: LogprobsMode,
    *,
    kv_cache_bytes: int | None = None,
) -> dict[str, Any]:
    """Returns the fields of vLLM's `EngineArgs` that decide what is sampled, and how fast.

    Without `kv_cache_bytes` a rank's cache is `rollout.kv_cache_gib` on a CPU, and on a GPU what
    vLLM finds to be left of `rollout.gpu_memory_utilization`.
    """
    # vLLM asks for its whole share to be free; whoever counts out the cache has seen to that.
    share = config.gpu_memory_utilization if kv_cache_bytes is None else _NO_SHARE
    if kv_cache_bytes is None and not has_gpu():
        kv_cache_bytes = config.kv_cache_gib * _GIB
    return {
        "model": model_path,
        "skip_tokenizer_init": True,
        "dtype": DTYPES[precision],
        "max_model_len": max_total_tokens,
        "max_num_seqs": config.max_sequences,
        # A split prompt would step its seeded generator with no token to show; on a CPU it fails.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_total_tokens, config.max_sequences, _PREFILL_TOKENS),
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": share,
        "kv_cache_memory_bytes": kv_cache_bytes,
        "kv_cache_dtype": config.kv_cache_dtype,
        "quantization": None if config.quantization == "none" else config.quantization,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "logprobs_mode": logprobs_mode,
        "generation_config": "vllm",  # or the model's own sampling defaults and end tokens come in
        "disable_log_stats": True,
        "seed": 0,
    }


def beside_training(config: RolloutConfig, *, weights: bool) -> dict[str, Any]:
    """Returns the fields of `EngineArgs` of an engine that shares its GPU with models.

    Without `weights` they are made up, where scales are not: no push would bring these.
    """
    scaled = config.quantization != "none" or config.kv_cache_dtype != "auto"
    return {
        "enable_sleep_mode": config.sleep and has_gpu(),
        "load_format": "auto" if weights or scaled else "dummy",
    }


def logprobs_mode(config: Config) -> LogprobsMode:
    """Returns which log-probabilities a run wants; pure.

    Raw ones are the model's own, which the policy is compared with. Importance weights ask for
    those of the distribution that is sampled from; validation sees to it that the two are one.
    """
    return "raw_logprobs" if config.oreal.importance.level == "none" else "processed_logprobs"


def server_command(config: Config, address: str, port: int) -> list[str]:
    """Returns the command that starts a rollout server for this config; pure."""
    transfer = TRANSFERS[config.rollout.server_transfer]
    arguments = engine_arguments(
        config.model.path,
        config.rollout,
        config.model.precision,
        config.sampling.max_total_tokens,
        logprobs_mode(config),
    ) | {
        "worker_extension_cls": QUALIFIED_NAME,
        "weight_transfer_config": json.dumps({"backend": transfer}),
        "host": address,
        "port": port,
        "enable_scale_out": True,  # the route that takes and gives token ids
        "disable_uvicorn_access_log": True,
    }
    flags = [flag for name, value in arguments.items() for flag in _flags(name, value)]
    # As a module: the package for CPUs has no other way to start it.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]


def server_environment(config: Config) -> dict[str, str]:
    """Returns the environment of that command: the present one, and what its routes ask for."""
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if config.rollout.enforce_eager and not has_gpu():
        # The sampler compiles even in eager mode: that needs a C++ compiler and is slower.
        variables["TORCH_COMPILE_DISABLE"] = "1"
    return os.environ | variables


def _flags(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [] if value is None else [f"--{option}", str(value)]
