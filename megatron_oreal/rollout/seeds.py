"""One seed a sample: a response does not depend on batching, dealing or the number of ranks."""

from __future__ import annotations

import hashlib

_SEED_BITS = 63  # a positive int64, the widest seed that samplers take


def sample_seed(run_seed: int, iteration: int, prompt_id: str, sample: int) -> int:
    """Returns the seed of one sample: 63 bits of blake2b, the same on every machine."""
    # repr quotes the id, so no choice of id can imitate another (iteration, id, sample).
    key = repr((run_seed, iteration, prompt_id, sample)).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "little") & ((1 << _SEED_BITS) - 1)
