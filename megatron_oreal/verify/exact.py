"""The verifier `exact`: the same text, but for spaces at the ends and between words."""

from __future__ import annotations

from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import Comparison, Pair


def compare(pair: Pair, tolerance: float = 0.0) -> Comparison:  # noqa: ARG001 - one signature
    """Compares two texts; always decided."""
    if pair.gold.split() == pair.answer.split():
        return Comparison(Outcome.CORRECT, "same text")
    return Comparison(Outcome.INCORRECT, "another text")
