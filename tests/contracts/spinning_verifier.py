"""A user's verifier that never comes back."""

from __future__ import annotations


def spin(gold: str, answer: str) -> bool:
    while True:
        pass
