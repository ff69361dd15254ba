"""Pushes the policy's weights into the rollout engine and proves that they arrived."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_oreal.parallel.collectives import all_gather_bytes
from megatron_oreal.rollout.engine import RolloutEngine
from megatron_oreal.weights.bridge import HfStream
from megatron_oreal.weights.checksum import tensor_checksum
from megatron_oreal.weights.geometry import Box

Checksums = dict[str, int]


class WeightSync:
    """Carries whole Hugging Face tensors from the ranks of a policy to all engines."""

    def __init__(self, stream: HfStream, engine: RolloutEngine) -> None:
        self._stream = stream
        self._engine = engine

    def push(self) -> Checksums:
        """Loads the policy's present weights into every engine; collective over the world.

        Returns:
            The checksum of each tensor: that of what the policy's ranks hold, equal to that of what
            this rank's engine was handed.

        Raises:
            RuntimeError: Some rank was handed another tensor than the policy holds; names it, on
                every rank.
        """
        received: Checksums = {}
        self._engine.load_weights(self._counted(received))
        sent = self._stream.checksums()
        differing = [name for name, value in sent.items() if received.get(name) != value]
        found = [text.decode() for text in all_gather_bytes("".join(differing[:1]).encode())]
        if any(found):
            ranks = [rank for rank, name in enumerate(found) if name]
            name = found[ranks[0]]
            raise RuntimeError(f"weight sync: {name} arrived changed on ranks {ranks}")
        return sent

    def _counted(self, received: Checksums) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._stream.full_tensors():
            yield name, tensor
            # Counted when the engine asks for the next: what it did to this one shows as well.
            shape = tuple(tensor.shape)
            received[name] = int(tensor_checksum(tensor, Box.whole(shape), shape))
