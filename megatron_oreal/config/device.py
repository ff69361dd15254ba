"""Whether a rank's GPU and Transformer Engine can compute what a config asks for, told at start-up.

Pure: what there is comes as a `Device`, so that another machine can be asked about as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_oreal.config.checks import require
from megatron_oreal.config.schema_precision import ROLES, SIDE_MULTIPLE
from megatron_oreal.config.validate import ModelSizes

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config
    from megatron_oreal.config.schema_precision import Fp8Recipe, Role

Capability = tuple[int, int]

# The first GPUs that have what a recipe multiplies with, and one of their names.
_LEAST: dict[Fp8Recipe, tuple[Capability, str]] = {
    "delayed": ((8, 9), "L40S, H100 or newer"),
    "tensorwise": ((8, 9), "L40S, H100 or newer"),
    "blockwise": ((9, 0), "H100 or newer"),
    "mxfp8": ((10, 0), "B200 or newer"),
}
_LEAST_ENGINE: tuple[Capability, str] = ((8, 9), "L40S, H100 or newer")
_NO_MXFP8: Capability = (12, 0)  # TE has no MXFP8 of its own for GeForce and RTX of this family
_LEAST_TE: dict[Fp8Recipe, tuple[int, int]] = {
    "delayed": (1, 0),
    "tensorwise": (2, 2),
    "blockwise": (2, 3),
    "mxfp8": (2, 1),
}
_HEAD_MULTIPLE = 8
_LARGE_HEADS: Capability = (9, 0)


@dataclass(frozen=True)
class Device:
    """What a rank computes on; `capability` is None on a CPU.

    `transformer_engine` is its version, None where it is not installed.
    """

    name: str
    capability: Capability | None = None
    transformer_engine: str | None = None

    @property
    def runs_transformer_engine(self) -> bool:
        """Whether layers are Transformer Engine's."""
        return self.capability is not None and self.transformer_engine is not None


class LayerSizes(ModelSizes, Protocol):
    """What decides which kernels can compute a layer; `hidden` is the width of the residual."""

    @property
    def hidden(self) -> int: ...  # noqa: D102  in the class's docstring


def check_device(config: Config, model: LayerSizes, device: Device) -> None:
    """Checks that a device can compute this model under this config.

    Raises:
        UserError: naming the key, the numbers and what to change.
    """
    for role in ROLES:
        if config.fp8.role(role).recipe != "none":
            _check_recipe(config, role, device)
            _check_sides(config, model, role)
    if device.runs_transformer_engine and config.model.precision == "bf16":
        _check_heads(model.head_dim, device)
    if config.rollout.backend == "vllm":
        check_engine_device(config, device)


def check_engine_device(config: Config, device: Device) -> None:
    """Checks that an engine in the rank can round its weights and cache as the config says.

    Raises:
        UserError: naming the key, the numbers and what to change.
    """
    least, named = _LEAST_ENGINE
    for key, default in (("quantization", "none"), ("kv_cache_dtype", "auto")):
        if getattr(config.rollout, key) == "fp8":
            fix = f"{device.name} has no FP8; set {default}"
            require(device.capability is not None, f"rollout.{key}", "fp8", fix)
            has = device.capability or (0, 0)
            fix = (
                f"needs compute capability {_dotted(least)} ({named}), {device.name} has"
                f" {_dotted(has)}; set {default}"
            )
            require(has >= least, f"rollout.{key}", "fp8", fix)


def _check_recipe(config: Config, role: Role, device: Device) -> None:
    recipe = config.fp8.role(role).recipe
    key = f"fp8.{role}.recipe"
    require(device.capability is not None, key, recipe, f"{device.name} has no FP8; set none")
    least, named = _LEAST[recipe]
    has = device.capability or (0, 0)
    fix = (
        f"needs compute capability {_dotted(least)} ({named}), {device.name} has {_dotted(has)};"
        " set none"
    )
    require(has >= least, key, recipe, fix)
    newer = recipe == "mxfp8" and has >= _NO_MXFP8
    fix = f"Transformer Engine has none for capability {_dotted(has)} ({device.name})"
    require(not newer, key, recipe, f"{fix}; set tensorwise")
    version = device.transformer_engine
    fix = "needs Transformer Engine, which is not installed: pip install"
    require(version is not None, key, recipe, f"{fix} 'transformer-engine[pytorch]', or set none")
    wanted = _LEAST_TE[recipe]
    fix = f"needs Transformer Engine {_dotted(wanted)}, installed is {version}; upgrade it"
    require(_parsed(version or "0") >= wanted, key, recipe, f"{fix}, or set none")


def _check_sides(config: Config, model: LayerSizes, role: Role) -> None:
    """A matrix of one rank has sides of whole multiples."""
    recipe, tensor = config.fp8.role(role).recipe, config.parallel.tensor
    sides = {
        "hidden size": model.hidden,
        "query rows": model.heads * model.head_dim // tensor,
        "rows of query, keys and values": (
            (model.heads + 2 * model.kv_heads) * model.head_dim // tensor
        ),
        "feed-forward rows": model.ffn // tensor,
    }
    multiple = SIDE_MULTIPLE[recipe]
    for name, side in sides.items():
        where = "" if name == "hidden size" else f" on each of {tensor} tensor-parallel ranks"
        fix = f"FP8 multiplies sides that are multiples of {multiple}, the model has {side} {name}"
        way_out = "set none" if tensor == 1 or not where else "lower parallel.tensor, or set none"
        key = f"fp8.{role}.recipe"
        require(side % multiple == 0, key, recipe, f"{fix}{where}; {way_out}")


def _check_heads(head_dim: int, device: Device) -> None:
    large = (device.capability or (0, 0)) >= _LARGE_HEADS
    most = 256 if large else 128
    fix = (
        f"Transformer Engine's attention on {device.name} takes multiples of {_HEAD_MULTIPLE} up to"
        f" {most}; use another model, or uninstall transformer-engine to attend in plain torch"
    )
    require(head_dim % _HEAD_MULTIPLE == 0 and head_dim <= most, "head_dim", head_dim, fix)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _parsed(version: str) -> tuple[int, int]:
    """Returns major and minor of `2.20.2+cu13` and the like."""
    major, minor, *_ = [*version.split("."), "0"]
    return int(major), int(minor)
