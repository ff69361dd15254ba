"""How packed sequences are cut over context-parallel ranks: as Transformer Engine cuts `thd`.

Each sequence is padded to a multiple of 2 * cp and cut into as many equal chunks; rank r holds the
chunks r and 2 * cp - 1 - r, an early and a late one, so that causal attention costs all ranks the
same. Padding stands at a sequence's end, where no real token attends to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class SequenceCut:
    """This rank's part of packed sequences, and the multiples that their lengths must be.

    `token_multiple` is what the tokens of one rank are a multiple of: FP8's products ask for it.
    """

    tp_size: int = 1
    cp_size: int = 1
    cp_rank: int = 0
    token_multiple: int = 1

    @property
    def sequence_multiple(self) -> int:
        """What the length of each sequence is a multiple of."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def total_multiple(self) -> int:
        """What all sequences together are a multiple of: tensor-parallel ranks share them, too."""
        each = self.tp_size * self.token_multiple
        return self.cp_size * math.lcm(self.sequence_multiple // self.cp_size, each)

    def chunks(self, length: int) -> tuple[tuple[int, int], ...]:
        """Returns start and end of the chunks of one sequence that this rank holds, in order."""
        if self.cp_size == 1:
            return ((0, length),)
        chunk = length // self.sequence_multiple
        numbers = (self.cp_rank, self.sequence_multiple - 1 - self.cp_rank)
        return tuple((number * chunk, (number + 1) * chunk) for number in numbers)

    def positions(self, lengths: Sequence[int]) -> torch.Tensor:
        """Returns where in the pack each token of this rank stands, `[sum(lengths) / cp]`."""
        starts = accumulate(lengths, initial=0)
        return torch.cat(
            [
                torch.arange(start + low, start + high)
                for start, length in zip(starts, lengths, strict=False)
                for low, high in self.chunks(length)
            ]
        )

    def sequence_order(self, lengths: Sequence[int]) -> torch.Tensor:
        """Returns the permutation that puts what all ranks hold, rank by rank, into pack order."""
        ranks = (SequenceCut(self.tp_size, self.cp_size, rank) for rank in range(self.cp_size))
        return torch.cat([rank.positions(lengths) for rank in ranks]).argsort()


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple
