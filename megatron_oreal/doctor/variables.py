"""Environment variables that hurt a run, and those that all its ranks should agree on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_oreal.doctor.report import Finding, Level

_AREA = "environment"
_OFF = ("", "0", "OFF", "off", "False", "false")

HARMFUL_IF_ON = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before: for debugging only",
    "NCCL_P2P_DISABLE": "NCCL leaves NVLink and PCIe peers unused",
    "NCCL_IB_DISABLE": "NCCL leaves InfiniBand unused: nodes talk over TCP",
    "NCCL_SHM_DISABLE": "NCCL leaves shared memory unused",
    "NCCL_CHECKS_DISABLE": "NCCL no longer checks what it is asked",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "each tensor is allocated by the driver: very slow",
    "TORCHDYNAMO_DISABLE": "vLLM neither compiles nor captures well: decodes at half the speed",
    "TORCH_COMPILE_DISABLE": "vLLM neither compiles nor captures well: decodes at half the speed",
    "TORCH_SHOW_CPP_STACKTRACES": "slows every error that is caught",
    "NVIDIA_TF32_OVERRIDE": "changes the precision of fp32 products behind the config's back",
    "PYTHONMALLOC": "a debugging allocator slows every rank's Python",
    "PYTHONDEVMODE": "slows every rank's Python",
}
HARMFUL_VALUES = {
    ("NCCL_DEBUG", "TRACE"): "writes gigabytes; INFO names the network, WARN is enough",
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"): "every collective is checked by another one",
    ("VLLM_USE_V1", "0"): "vLLM's old engine: rollouts need the present one",
    ("NCCL_SOCKET_IFNAME", "lo"): "right on one node; ranks of several never find each other",
    ("GLOO_SOCKET_IFNAME", "lo"): "right on one node; ranks of several never find each other",
}
# Where ranks differ in one of these, they differ in what they compute or how they talk.
SHARED_PREFIXES = ("NCCL_", "CUDA_", "CUBLAS_", "TORCH", "PYTORCH_", "NVTE_", "VLLM_", "OMP_")
SHARED_PREFIXES += ("HF_", "GLOO_", "UCX_", "NVIDIA_", "LD_", "PYTHONPATH", "TRITON_", "UB_")
OWN_OF_A_RANK = ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_", "NVIDIA_VISIBLE_DEVICES")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def check_variables(variables: Mapping[str, str], *, gpus: bool) -> list[Finding]:
    """Names the variables that slow a run down or change what it computes; pure.

    Args:
        variables: The environment.
        gpus: Whether this machine has any.
    """
    found = list(_harmful(variables))
    if gpus and variables.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        value = variables.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set")
        says = "set it to 1: Megatron overlaps its communication in the order of launches"
        found.append(Finding(_AREA, "CUDA_DEVICE_MAX_CONNECTIONS", Level.NOTE, value, says))
    if "OMP_NUM_THREADS" not in variables and not gpus:
        says = "set it to 1: ranks on one machine share its cores"
        found.append(Finding(_AREA, "OMP_NUM_THREADS", Level.NOTE, "not set", says))
    return found or [Finding(_AREA, "variables", Level.FINE, "none that hurts")]


def _harmful(variables: Mapping[str, str]) -> Iterator[Finding]:
    for name, says in HARMFUL_IF_ON.items():
        if variables.get(name, "") not in _OFF:
            yield Finding(_AREA, name, Level.NOTE, variables[name], says)
    for (name, value), says in HARMFUL_VALUES.items():
        if variables.get(name) == value:
            yield Finding(_AREA, name, Level.NOTE, value, says)


def shared_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that ranks should agree on, without anything secret; pure."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(SHARED_PREFIXES)
        and not name.startswith(OWN_OF_A_RANK)
        and not any(word in name for word in SECRET)
    }
