"""How many tokens' logits the language-model head has at one time, and in how many bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config

LOGITS_BYTES = 448 << 20  # with what else it has, the head stays below half a GiB
_EVEN = 128  # a matrix product likes rows in such multiples


def logit_bytes(config: Config) -> int:
    """Bytes that a token and word take: the logit, and its gradient where not in its place."""
    if config.model.precision == "fp32":
        return 4
    return 4 + 2 if config.engine.head_logits_fp32 else 2


def most_chunk_tokens(config: Config, words: int) -> int:
    """Tokens of the largest chunk, for a rank that has so many words.

    A chunk costs a pass over the output weight's gradient, whatever its size: hence as few as fit.
    """
    return config.engine.head_chunk_tokens or max(1, LOGITS_BYTES // (words * logit_bytes(config)))


def chunk_tokens(most: int, tokens: int) -> int:
    """Tokens of each chunk but the last, all nearly alike: as many chunks as `most` asks for."""
    chunks = math.ceil(tokens / most) or 1
    return min(most, math.ceil(tokens / chunks / _EVEN) * _EVEN or 1)
