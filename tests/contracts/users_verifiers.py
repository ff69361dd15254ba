"""Verifiers as a user may write them; they start at once, since nothing of sympy is imported."""

from __future__ import annotations


def spin(gold: str, answer: str) -> bool:
    """Never comes back."""
    while True:
        pass


def digits(gold: str, answer: str) -> bool | None:
    """Compares numerals, and cannot say of anything else."""
    return gold == answer if answer.isdigit() else None
