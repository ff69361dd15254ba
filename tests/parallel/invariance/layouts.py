"""The layouts whose numbers must agree: a pure list of all, and a few that meet every pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from typing import Literal

from tests.parallel.invariance.inputs import HEADS, LAYERS

MOST_RANKS = 4
DEGREES = range(1, MOST_RANKS + 1)
Recompute = Literal["none", "full", "selective"]
Choice = tuple[str, object]


@dataclass(frozen=True)
class Layout:
    """How a batch goes through the models; none of it may change a number.

    `tight` is a micro-batch budget that holds a trajectory or a few, else one micro-batch holds
    all; it may be `filled` up with padding. `recompute` says which activations are computed again:
    of whole layers, of MLPs, or none. `backwards` hands the trajectories over in the opposite
    order. Two choices are the model's: whether its embeddings are `tied`, and its precision; the
    bands of bf16 are wider.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    tight: bool = False
    filled: bool = False
    backwards: bool = False
    recompute: Recompute = "none"
    distributed_optimizer: bool = False
    tied: bool = False
    bf16: bool = False

    @property
    def ranks(self) -> int:
        """Processes it takes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shape(self) -> str:
        """The parallel part of it, in words."""
        names = ("tp", "pp", "vpp", "cp", "dp")
        degrees = {name: getattr(self, name) for name in names}
        words = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
        words += ["sp"] * self.sequence_parallel
        return " ".join(words) or "one rank"

    def __str__(self) -> str:
        """All of it, in words."""
        switches = {
            "bf16": self.bf16,
            "tied": self.tied,
            "micro-batches": self.tight,
            "filled up": self.filled,
            "backwards": self.backwards,
            f"{self.recompute} recomputation": self.recompute != "none",
            "distributed optimizer": self.distributed_optimizer,
        }
        return ", ".join([self.shape, *(word for word, on in switches.items() if on)])

    @property
    def is_valid(self) -> bool:
        """Whether the toy can be cut so."""
        return (
            self.ranks <= MOST_RANKS
            and HEADS % self.tp == 0
            and LAYERS % (self.pp * self.vpp) == 0
            and (self.pp > 1 or self.vpp == 1)
            and (self.tp > 1 or not self.sequence_parallel)
        )

    @property
    def plain(self) -> Layout:
        """One rank, one micro-batch, no switch on: what it is compared with."""
        return Layout(tied=self.tied, bf16=self.bf16, distributed_optimizer=self.bf16)


def full_product() -> list[Layout]:
    """Every valid layout of the untied model in fp32; every shape once tied, and once in bf16.

    Tied ones recompute MLPs and fill micro-batches up, bf16 ones recompute layers.
    """
    off_on = (False, True)
    shapes = [
        shape
        for *degrees, sequence_parallel in product(*[DEGREES] * 5, off_on)
        if (shape := Layout(*degrees, sequence_parallel=sequence_parallel)).is_valid
    ]
    untied = [
        replace(shape, tight=tight, recompute=recompute, distributed_optimizer=distributed)
        for shape in shapes
        for tight, recompute, distributed in product(off_on, ("none", "full"), off_on)
    ]
    once = [replace(shape, tight=True, distributed_optimizer=True) for shape in shapes]
    tied = [replace(layout, tied=True, filled=True, recompute="selective") for layout in once]
    bf16 = [replace(layout, bf16=True, recompute="full") for layout in once]
    return sorted([*untied, *tied, *bf16], key=lambda layout: layout.ranks)


def covering_set(layouts: list[Layout]) -> list[Layout]:
    """Picks layouts until each pair of choices that occurs in one of `layouts` has been met.

    Greedy: the one that meets most that are new, the first of them where several do.
    """
    missing = {pair for layout in layouts for pair in _pairs(layout)}
    chosen = []
    while missing:
        best = max(layouts, key=lambda layout: len(missing & _pairs(layout)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(layout: Layout) -> set[tuple[Choice, Choice]]:
    return set(combinations(asdict(layout).items(), 2))
