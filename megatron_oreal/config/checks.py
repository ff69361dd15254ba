"""Range checks of one config section, called from `__post_init__`.

They name the key inside its section (`lr`); `load.py` puts the section in front of it.
"""

from __future__ import annotations

import math

from megatron_oreal.config.errors import UserError


def require(ok: bool, key: str, value: object, fix: str) -> None:
    """Raises UserError `key=value: fix` unless `ok`."""
    if not ok:
        raise UserError(f"{key}={value}: {fix}")


def at_least(section: object, minimum: float, *keys: str) -> None:
    """Raises UserError unless every one of these keys is finite and `minimum` or more."""
    for key in keys:
        value = getattr(section, key)
        require(math.isfinite(value) and value >= minimum, key, value, f"set {minimum} or more")


def above_zero(section: object, *keys: str) -> None:
    """Raises UserError unless every one of these keys is finite and greater than zero."""
    for key in keys:
        value = getattr(section, key)
        require(math.isfinite(value) and value > 0, key, value, "set a number above 0")


def share(section: object, *keys: str) -> None:
    """Raises UserError unless every one of these keys lies in [0, 1]."""
    for key in keys:
        value = getattr(section, key)
        require(0 <= value <= 1, key, value, "set a number from 0 to 1")


def positive_share(section: object, *keys: str) -> None:
    """Raises UserError unless every one of these keys lies in (0, 1]."""
    for key in keys:
        value = getattr(section, key)
        require(0 < value <= 1, key, value, "set a number above 0 and up to 1")


def share_below_one(section: object, *keys: str) -> None:
    """Raises UserError unless every one of these keys lies in [0, 1)."""
    for key in keys:
        value = getattr(section, key)
        require(0 <= value < 1, key, value, "set a number from 0 to below 1")
