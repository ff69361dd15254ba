"""What the engine asks of this package: weights in from Hugging Face, out to it, whole to vLLM."""

from __future__ import annotations

import socket
from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError

from megatron_oreal.config.errors import UserError
from megatron_oreal.parallel.collectives import all_gather_bytes, world_rank
from megatron_oreal.weights.hf_io import HfWriter
from megatron_oreal.weights.layout import MegatronPlace, hf_regions, megatron_regions
from megatron_oreal.weights.plan import PlanSummary, RankRound, TensorSpec, make_plan
from megatron_oreal.weights.sharded import open_store
from megatron_oreal.weights.sums import SourceSums, source_sums
from megatron_oreal.weights.transport import Meddle, region_view, stream_full_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from megatron_oreal.models.family import Family, ModelDims
    from megatron_oreal.weights.geometry import Region


_READ_BYTES = 32 << 20


class RankLayout(msgspec.Struct, frozen=True):
    """What a rank tells the others of its weights: enough for each of them to know its regions."""

    place: MegatronPlace
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    node: str


@dataclass(frozen=True)
class HfStream:
    """A model's weights as whole Hugging Face tensors, its plan made once; see `open_stream`.

    Holds this rank's live parameters: each pass reads what they are then.
    """

    tensors: tuple[TensorSpec, ...]
    summary: PlanSummary
    rounds: tuple[RankRound, ...]
    params: Mapping[str, torch.Tensor]
    sums: SourceSums

    @property
    def device(self) -> torch.device:
        """Where the parameters lie and the streamed tensors are built."""
        return next(iter(self.params.values())).device

    @property
    def received(self) -> tuple[str, ...]:
        """Names of the tensors that come to this rank."""
        return tuple(dict.fromkeys(spec.name for part in self.rounds for spec in part.tensors))

    def full_tensors(self, meddle: Meddle | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields `(Hugging Face name, whole tensor)` in the order of `tensors`, round by round.

        Collective over the world: every rank must exhaust it, also one that is no receiver and
        for which it yields nothing. The tensors are the caller's to keep. Tied embeddings come
        once, under the embedding's name.
        """
        return stream_full_tensors(self.rounds, self.params, device=self.device, meddle=meddle)

    def checksums(self) -> dict[str, int]:
        """Returns the checksum of every tensor as its holders have it; collective over the world.

        Each element is counted on one of the ranks that hold it. To be compared with the sum of
        `tensor_checksum` over what a destination holds.
        """
        return self.sums.count()[0]


def open_stream(
    params: Mapping[str, torch.Tensor],
    family: Family,
    dims: ModelDims,
    place: MegatronPlace,
    *,
    round_bytes: int,
    receivers: Collection[int] | None = None,
    node: str | None = None,
) -> HfStream:
    """Plans how whole tensors reach their receivers; collective over the world, once for a model.

    Args:
        params: This rank's parameters by their names in `GPTModel.named_parameters()`.
        family: The model's family.
        dims: The model's dimensions.
        place: This rank's coordinates.
        round_bytes: Bound on what travels at a time, and so on memory.
        receivers: World ranks that get every tensor; None: all of them.
        node: Name of this rank's node, within which bytes travel fast; None: the host's.

    Raises:
        ValueError: The ranks' layouts do not make up a model of these dimensions.
    """
    found = survey(params, family, dims, place, node=node)
    whole = hf_regions(family.tensors(dims))
    ranks = range(len(found.sources))
    targets = [whole if receivers is None or rank in receivers else [] for rank in ranks]
    plan = make_plan(found.tensors, found.sources, targets, round_bytes, found.nodes)
    rank = world_rank()
    return HfStream(
        tensors=found.tensors,
        summary=plan.summary(),
        rounds=tuple(plan.part_of(rank)),
        params=params,
        sums=source_sums(found.tensors, found.sources, [whole], rank=rank, params=params),
    )


@dataclass(frozen=True)
class Survey:
    """Who holds what of a model: its tensors, each rank's regions and node, alike on every rank."""

    tensors: tuple[TensorSpec, ...]
    sources: list[list[Region]]
    nodes: list[int]


def survey(
    params: Mapping[str, torch.Tensor],
    family: Family,
    dims: ModelDims,
    place: MegatronPlace,
    *,
    node: str | None = None,
) -> Survey:
    """Learns who holds what; collective over the world. Arguments and errors: see `open_stream`."""
    layouts = _exchange_layouts(params, place, node or socket.gethostname())
    regions = {
        payload: megatron_regions(family, dims, layout.shapes, layout.place)
        for payload, layout in layouts
    }
    sources = [regions[payload] for payload, _ in layouts]
    shapes = family.tensors(dims)
    dtypes = _tensor_dtypes(sources, [layout for _, layout in layouts])
    absent = [name for name in shapes if name not in dtypes]
    if absent:
        raise ValueError(f"{absent[0]}: no rank holds it ({len(absent)} such tensors)")
    names = [layout.node for _, layout in layouts]
    return Survey(
        tensors=tuple(TensorSpec(name, shape, dtypes[name]) for name, shape in shapes.items()),
        sources=sources,
        nodes=[names.index(name) for name in names],
    )


def load_hf(
    params: Mapping[str, torch.Tensor],
    folder: str | Path,
    family: Family,
    dims: ModelDims,
    place: MegatronPlace,
) -> None:
    """Fills this rank's parameters from a Hugging Face folder; a rank reads its own slices only.

    The folder may also hold the files of a Megatron layout, this one or another: see `sharded`.

    Not collective; all ranks that see the same files come to the same refusal, since each checks
    the whole folder first. Values are converted to the parameters' precision; vocabulary padding
    becomes zero. Parameters that no checkpoint has (a new scalar head) are left out of `params`.

    Raises:
        UserError: The folder does not hold a whole checkpoint of this model.
        ValueError: The parameters are not those of such a model.
    """
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    regions = megatron_regions(family, dims, shapes, place)
    write = region_view(params)
    with open_store(folder) as checkpoint, torch.no_grad():
        tied = frozenset({family.output} if dims.tied_embeddings else ())
        checkpoint.audit(family.tensors(dims), optional=tied)
        covered: Counter[str] = Counter()
        for region in regions:
            covered[region.key] += region.box.size
        for name, param in params.items():
            if covered[name] < param.numel():
                param.zero_()
        for region in regions:
            for part in _parts(region, checkpoint.spec(region.tensor).dtype.itemsize):
                write(part).copy_(checkpoint.read(part.tensor, part.box))


def _parts(region: Region, itemsize: int) -> list[Region]:
    """Returns the region in parts of so few bytes that what is read of one may be a copy."""
    count = -(-region.box.size * itemsize // _READ_BYTES)
    boxes = (region.box.part(number, count) for number in range(count))
    return [region.narrow(box) for box in boxes if box]


def export_hf(
    stream: HfStream,
    folder: str | Path,
    *,
    source: str | Path,
    shard_bytes: int,
    constants: Mapping[str, torch.Tensor] | None = None,
    config_changes: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model as a Hugging Face folder on rank 0; collective over the world.

    Args:
        stream: One whose receivers are rank 0 alone, or at least hold it.
        folder: The folder to make; it must not exist.
        source: The folder whose tokenizer, generation config and `config.json` go along.
        shard_bytes: Bound on the size of a shard, one of which is held in memory.
        constants: Further tensors by name, which no rank holds.
        config_changes: Keys that differ from the source's `config.json`.

    Raises:
        UserError: On every rank: the folder exists, the source is no model, the disk refuses.
    """
    writer, problem = None, ""
    if world_rank() == 0:
        try:
            specs = [
                TensorSpec(name, tuple(tensor.shape), tensor.dtype)
                for name, tensor in (constants or {}).items()
            ]
            tensors = [*stream.tensors, *specs]
            writer = HfWriter(folder, source, tensors, shard_bytes, config_changes)
        except (UserError, OSError) as error:
            problem = str(error)
    _agree(problem, folder)
    streamed = stream.full_tensors()
    if writer:
        problem = _write(writer, chain(streamed, (constants or {}).items()))
    deque(streamed, maxlen=0)  # whatever befell rank 0, no rank may leave the others waiting
    _agree(problem, folder)


def _write(writer: HfWriter, tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    """Returns what went wrong, empty where nothing did."""
    try:
        for name, tensor in tensors:
            writer.add(name, tensor)
            del tensor  # or it would outlive its shard by a round
        writer.finish()
    except (UserError, OSError, SafetensorError) as error:
        writer.discard()
        return str(error)
    return ""


def _agree(problem: str, folder: str | Path) -> None:
    """Raises on every rank what rank 0 found; collective over the world."""
    found = all_gather_bytes(problem.encode())[0].decode()
    if found:
        raise UserError(f"cannot export to {folder}: {found}")


def _exchange_layouts(
    params: Mapping[str, torch.Tensor], place: MegatronPlace, node: str
) -> list[tuple[bytes, RankLayout]]:
    """Returns each rank's layout and its encoding, which replicas share; collective, the world."""
    layout = RankLayout(
        place=place,
        shapes={name: tuple(param.shape) for name, param in params.items()},
        dtypes={name: str(param.dtype).removeprefix("torch.") for name, param in params.items()},
        node=node,
    )
    payloads = all_gather_bytes(msgspec.msgpack.encode(layout))
    return [(payload, msgspec.msgpack.decode(payload, type=RankLayout)) for payload in payloads]


def _tensor_dtypes(
    sources: list[list[Region]], layouts: list[RankLayout]
) -> dict[str, torch.dtype]:
    dtypes: dict[str, str] = {}
    for regions, layout in zip(sources, layouts, strict=True):
        for region in regions:
            dtype = layout.dtypes[region.key]
            if dtypes.setdefault(region.tensor, dtype) != dtype:
                raise ValueError(f"{region.tensor} is {dtypes[region.tensor]} here, {dtype} there")
    return {name: getattr(torch, dtype) for name, dtype in dtypes.items()}
