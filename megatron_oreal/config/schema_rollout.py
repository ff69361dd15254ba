"""The section of the rollout engines: a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_oreal.config.checks import above_zero, at_least, positive_share, require


@dataclass(frozen=True)
class RolloutConfig:
    """The vLLM engines, inside the training ranks or as servers."""

    backend: Literal["vllm", "vllm_server"] = "vllm"
    server_hosts: tuple[str, ...] = ()
    server_wait_s: float = 600.0
    server_transfer: Literal["gloo", "nccl"] = "gloo"
    tensor_parallel: int = 1
    max_sequences: int = 256
    kv_cache_gib: int = 1
    gpu_memory_utilization: float = 0.5
    enforce_eager: bool = False
    sleep: bool = True
    quantization: Literal["none", "fp8"] = "none"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_mean_logprob_difference: float = 0.1
    sync_round_mib: int = 256
    check_sync: Literal["start", "always"] = "start"
    record: bool = True
    replay: str | None = None

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "tensor_parallel", "max_sequences", "kv_cache_gib", "sync_round_mib")
        positive_share(self, "gpu_memory_utilization")
        above_zero(self, "max_mean_logprob_difference")
        at_least(self, 0, "server_wait_s")
        hosts = self.server_hosts
        web = len(set(hosts)) == len(hosts) and all(host.startswith("http://") for host in hosts)
        require(web, "server_hosts", list(hosts), "name each server once, http://host:port")
        served = self.backend == "vllm_server"
        fix = "name servers, http://host:port" if served else "set rollout.backend=vllm_server"
        require(bool(hosts) == served, "server_hosts", list(hosts), fix)
        transfer, rounds = self.server_transfer, self.quantization != "none"
        fix = "its servers compare live weights, which rollout.quantization rounds; set gloo"
        require(not (served and rounds and transfer == "nccl"), "server_transfer", transfer, fix)
