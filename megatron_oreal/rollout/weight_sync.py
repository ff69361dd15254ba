"""Pushes the policy's weights into the rollout engines and proves that they arrived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_oreal.parallel.collectives import all_gather_bytes
from megatron_oreal.weights.bridge import HfStream, open_stream, survey
from megatron_oreal.weights.in_place import InPlace, open_in_place
from megatron_oreal.weights.sums import Checksums, differing, whole_sum
from megatron_oreal.weights.vllm_layout import difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from megatron_oreal.models.family import Family, ModelDims
    from megatron_oreal.rollout.engine import RolloutEngine
    from megatron_oreal.weights.layout import MegatronPlace
    from megatron_oreal.weights.transport import Meddle

Check = Literal["start", "always"]


class Route(Protocol):
    """A way for weights from the policy's ranks to the engines."""

    @property
    def engine(self) -> RolloutEngine:
        """Where it leads."""
        ...

    @property
    def description(self) -> str:
        """The way in a few words."""
        ...

    def carry(self, *, check: bool) -> list[str]:
        """Brings the policy's present weights to all engines; collective over the world.

        With `check`, returns the names of tensors that this rank's engine does not have as the
        policy has them; else nothing.
        """
        ...


@dataclass(frozen=True)
class InPlaceRoute:
    """Each rank's part of its engine, written into the live parameters."""

    plan: InPlace
    engine: RolloutEngine
    meddle: Meddle | None = None

    @property
    def description(self) -> str:
        """See `Route.description`."""
        return "in place"

    def carry(self, *, check: bool) -> list[str]:
        """See `Route.carry`."""
        self.plan.carry(self.meddle)
        self.engine.forget_prefixes()
        return differing(self.plan.expected(), self.plan.found()) if check else []


@dataclass(frozen=True)
class WholeTensorRoute:
    """Whole Hugging Face tensors, which the engine cuts and packs itself; `reason` says why."""

    stream: HfStream
    engine: RolloutEngine
    reason: str
    meddle: Meddle | None = None

    @property
    def description(self) -> str:
        """See `Route.description`."""
        return f"whole tensors, since {self.reason}"

    def carry(self, *, check: bool) -> list[str]:
        """See `Route.carry`."""
        if not check:
            self.engine.load_weights(self.stream.full_tensors(self.meddle))
            return []
        expected, received = self.stream.checksums(), Checksums()
        held_otherwise = self.engine.load_weights(self._counted(received), expected)
        handed = {name: expected[name] for name in self.stream.received}
        return [*differing(handed, received), *held_otherwise]

    def _counted(self, received: Checksums) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.stream.full_tensors(self.meddle):
            yield name, tensor
            # Counted when the engine asks for the next: what it did to this one shows as well.
            received[name] = whole_sum(tensor)


class WeightSync:
    """Pushes a policy's weights over a route; the first push is checked, the others if asked."""

    def __init__(self, route: Route, check: Check) -> None:
        self._route = route
        self._always = check == "always"
        self._checked = False

    @property
    def description(self) -> str:
        """How weights reach the engines, in a few words."""
        return self._route.description

    @property
    def engine(self) -> RolloutEngine:
        """What weights are pushed to."""
        return self._route.engine

    def carry(self) -> None:
        """Brings the weights and neither wakes nor checks anything; collective over the world."""
        self._route.carry(check=False)

    def push(self, *, check: bool = False) -> None:
        """Brings the policy's present weights into every engine; collective over the world.

        Engines that sleep are woken, their weights before and their cache after: never is there
        memory in use for both the cache and weights on their way.

        Args:
            check: Checks this push as well.

        Raises:
            RuntimeError: In a checked push, on every rank: some rank's engine has another tensor
                than the policy; names it.
        """
        check = check or self._always or not self._checked
        self.engine.wake_weights()
        wrong = self._route.carry(check=check)
        if check:
            _refuse(wrong)
            self._checked = True
        self.engine.wake_cache()


def _refuse(wrong: Sequence[str]) -> None:
    """Raises a `RuntimeError` on every rank if any names a tensor; collective over the world."""
    found = [text.decode() for text in all_gather_bytes("".join(wrong[:1]).encode())]
    ranks = [rank for rank, name in enumerate(found) if name]
    if ranks:
        raise RuntimeError(f"weight sync: {found[ranks[0]]} arrived changed on ranks {ranks}")


def open_sync(
    params: Mapping[str, torch.Tensor],
    family: Family,
    dims: ModelDims,
    place: MegatronPlace,
    engine: RolloutEngine,
    *,
    round_bytes: int,
    check: Check = "start",
    meddle: Meddle | None = None,
) -> WeightSync:
    """Plans how a policy's weights reach an engine; collective over the world, once for both.

    In place, if the live parameters of every rank's engine are found to be plain; else as whole
    tensors, which the engine loads.

    Args:
        params: This rank's parameters by their names in `GPTModel.named_parameters()`.
        family: The policy's family.
        dims: Its dimensions.
        place: This rank's coordinates.
        engine: The engine.
        round_bytes: Bound on what travels at a time, and so on memory.
        check: Which pushes are checked.
        meddle: For tests, see `Meddle`.
    """
    live = engine.live_shard()
    why_not = "the engine takes whole tensors"
    if live:
        found = survey(params, family, dims, place)
        dtypes = {spec.name: spec.dtype for spec in found.tensors}
        why_not = difference(live, family, dims, dtypes)
    reasons = [text.decode() for text in all_gather_bytes(why_not.encode()) if text]
    if live and not reasons:
        plan = open_in_place(found, params, family, dims, live, round_bytes=round_bytes)
        return WeightSync(InPlaceRoute(plan, engine, meddle), check)
    stream = open_stream(
        params, family, dims, place, round_bytes=round_bytes, receivers=engine.receivers
    )
    return WeightSync(WholeTensorRoute(stream, engine, reasons[0], meddle), check)
