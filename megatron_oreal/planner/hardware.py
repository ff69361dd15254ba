"""Public figures of GPUs and of the networks that their makers' eight-GPU machines have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Modules = Literal["transformer_engine", "torch"]

GIB = 1 << 30
GPUS_PER_NODE = 8
_TERA = 1e12
_GIGA = 1e9


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU; rates are per second and, of links, in one direction.

    `memory` is what programs can take, a little under the name's number; `flops` are dense bf16.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Cluster:
    """`ranks` GPUs of a kind, in nodes of eight, and whose modules layers are made of there."""

    gpu: Gpu
    ranks: int
    modules: Modules = "transformer_engine"


# Data sheets of the SXM modules; network: eight cards of 200 or 400 Gb/s in a DGX A100 or H100.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", int(39.4 * GIB), 312 * _TERA, 1555 * _GIGA, 300 * _GIGA, 25 * _GIGA, (8, 0)),
        Gpu("a100-80", int(79.1 * GIB), 312 * _TERA, 2039 * _GIGA, 300 * _GIGA, 25 * _GIGA, (8, 0)),
        Gpu("h100-80", int(79.1 * GIB), 989 * _TERA, 3350 * _GIGA, 450 * _GIGA, 50 * _GIGA),
        Gpu("h200-141", int(139.8 * GIB), 989 * _TERA, 4800 * _GIGA, 450 * _GIGA, 50 * _GIGA),
    )
}
