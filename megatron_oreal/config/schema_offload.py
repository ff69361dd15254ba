"""What of the models waits in host memory while it is not needed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OffloadConfig:
    """Each switch frees memory of the GPU in all phases but its own, for copies before and after.

    Bytes come back as they left; a gradient, which every step begins at zero, is not kept.
    """

    optimizer: bool = False
    gradients: bool = False
    reference: bool = False
    token_rm: bool = False
