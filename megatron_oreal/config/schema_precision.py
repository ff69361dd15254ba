"""FP8 of each model's matrices: which recipe, for which role, and what all recipes share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_oreal.config.checks import at_least, require

Role = Literal["policy", "reference", "token_rm"]
ROLES: tuple[Role, ...] = get_args(Role)
Fp8Recipe = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]

# What TE's matrix products ask of both sides of a matrix, and Megatron-Core of the tokens with it.
# Blockwise scales span 128 tokens: fewer at a rank's end, and TE gathers the tokens of tensor
# parallelism in bf16.
SIDE_MULTIPLE: dict[Fp8Recipe, int] = {
    "none": 1,
    "delayed": 16,
    "tensorwise": 16,
    "blockwise": 16,
    "mxfp8": 32,
}
TOKEN_MULTIPLE: dict[Fp8Recipe, int] = {**SIDE_MULTIPLE, "blockwise": 128}


@dataclass(frozen=True)
class Fp8RoleConfig:
    """How one model's layers multiply; its parameters are bf16 whatever the recipe."""

    recipe: Fp8Recipe = "none"
    bf16_layers_at_start: int = 0
    bf16_layers_at_end: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        ends = ("bf16_layers_at_start", "bf16_layers_at_end")
        at_least(self, 0, *ends)
        for key in ends:
            kept = getattr(self, key)
            fix = "recipe=delayed scales all layers together; set 0, or recipe=tensorwise"
            require(not kept or self.recipe != "delayed", key, kept, fix)
            fix = "recipe=none: all layers are bf16; set 0, or name a recipe"
            require(not kept or self.recipe != "none", key, kept, fix)


@dataclass(frozen=True)
class Fp8Config:
    """Which models multiply in FP8, and what delayed scaling remembers."""

    policy: Fp8RoleConfig = field(default_factory=Fp8RoleConfig)
    reference: Fp8RoleConfig = field(default_factory=Fp8RoleConfig)
    token_rm: Fp8RoleConfig = field(default_factory=Fp8RoleConfig)
    amax_history: int = 1024
    amax: Literal["max", "most_recent"] = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "amax_history")
        at_least(self, 0, "margin")

    def role(self, role: Role) -> Fp8RoleConfig:
        """Returns the section of a model."""
        return getattr(self, role)
