"""Carries out a plan: in each phase of a round one packed buffer and one send a pair of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from megatron_oreal.weights.geometry import Region
    from megatron_oreal.weights.plan import Exchange, RankRound, Transfer

    View = Callable[[Region], torch.Tensor]  # the elements of `region.local`, not a copy

Meddle = Callable[[str, torch.Tensor], None]
"""Takes what has just arrived of a tensor, `(its name, the piece)`, and may change it: tests alone
use it, to see that what a transfer spoils is found."""

_ALIGNMENT = 16  # bytes: every piece of a packed buffer may be viewed as any dtype


def region_view(tensors: Mapping[str, torch.Tensor]) -> View:
    """Returns a view function over tensors by their local names."""
    return lambda region: tensors[region.key].detach()[region.local.slices]


def lasting_view(tensors: Mapping[str, torch.Tensor]) -> View:
    """Returns a view function over tensors that stay, by their local names.

    A push in place takes thousands of views within milliseconds: each is made once, and again where
    its tensor has moved. They hold the tensors' memory as long as the function lives.
    """
    made: dict[int, tuple[Region, int, torch.Tensor]] = {}

    def view(region: Region) -> torch.Tensor:
        tensor = tensors[region.key]
        address = tensor.data_ptr()
        known = made.get(id(region))
        if known is None or known[1] != address:
            known = (region, address, tensor.detach()[region.local.slices])
            made[id(region)] = known  # with the region: its id stays its own
        return known[2]

    return view


def execute(
    rounds: Sequence[RankRound],
    read: View,
    write: View,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    meddle: Meddle | None = None,
) -> None:
    """Carries out one rank's part of a plan.

    Collective over `group` (None: the world), whose ranks the plan numbers.

    Args:
        rounds: `plan.part_of(rank)`.
        read: Gives the source elements of a region.
        write: Gives the elements of a target region, which are overwritten; dtypes may differ
            from the source's, values are then converted.
        device: Where packed buffers lie; one the group can send from.
        group: The process group.
        meddle: See `Meddle`.
    """
    for round_ in rounds:
        _run_round(round_, read, write, device=device, group=group, meddle=meddle)


def stream_full_tensors(
    rounds: Sequence[RankRound],
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    meddle: Meddle | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields whole Hugging Face tensors `(name, tensor)`, round by round, in the plan's order.

    Collective over `group` (None: the world), whose ranks the plan numbers: every rank must
    exhaust the iterator, also one that receives nothing and for which it yields nothing.

    Args:
        rounds: `plan.part_of(rank)` of a plan whose targets are whole tensors.
        tensors: This rank's parameters by their local names.
        device: Where the tensors are built.
        group: The process group.
        meddle: See `Meddle`.
    """
    read = region_view(tensors)
    last_round = {spec.name: number for number, part in enumerate(rounds) for spec in part.tensors}
    whole: dict[str, torch.Tensor] = {}
    for number, round_ in enumerate(rounds):
        for spec in round_.tensors:
            if spec.name not in whole:
                whole[spec.name] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        # The view dies with the round, or what it has seen would live beside the next one.
        _run_round(round_, read, region_view(whole), device=device, group=group, meddle=meddle)
        for spec in round_.tensors:
            if last_round[spec.name] == number:
                yield spec.name, whole.pop(spec.name)  # or two rounds would live side by side


def _run_round(
    round_: RankRound,
    read: View,
    write: View,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None,
    meddle: Meddle | None,
) -> None:
    def copy_own() -> None:
        for transfer in round_.copies:
            assert transfer.source is not None, "a copy is no relay"
            _deliver(transfer, read(transfer.source), write)

    def held(transfer: Transfer) -> torch.Tensor:
        assert transfer.source is not None, "holders send first"
        return read(transfer.source)

    arrived = _exchange(round_.direct, held, device=device, group=group, meanwhile=copy_own)
    pieces = {(transfer.spec.name, transfer.box): piece for transfer, piece in arrived}
    for transfer, piece in arrived:
        if meddle:
            meddle(transfer.spec.name, piece)
        _deliver(transfer, piece, write)
    relayed = _exchange(
        round_.relayed,
        lambda transfer: pieces[transfer.spec.name, transfer.box],
        device=device,
        group=group,
    )
    for transfer, piece in relayed:
        _deliver(transfer, piece, write)


def _exchange(
    exchange: Exchange,
    value: Callable[[Transfer], torch.Tensor],
    *,
    device: torch.device,
    group: dist.ProcessGroup | None,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[tuple[Transfer, torch.Tensor]]:
    """Sends each peer one buffer, runs `meanwhile`, returns what came, cut out of the buffers."""
    outgoing = {peer: _pack(sends, value, device) for peer, sends in exchange.sends.items()}
    incoming = {
        peer: torch.empty(_packed_bytes(transfers), dtype=torch.uint8, device=device)
        for peer, transfers in exchange.receives.items()
    }
    operations = [
        dist.P2POp(operation, buffer, _global_rank(peer, group), group)
        for operation, buffers in ((dist.isend, outgoing), (dist.irecv, incoming))
        for peer, buffer in buffers.items()
    ]
    pending = dist.batch_isend_irecv(operations) if operations else []
    meanwhile()
    for work in pending:
        work.wait()
    return [
        arrived
        for peer, transfers in exchange.receives.items()
        for arrived in _pieces(transfers, incoming[peer])
    ]


def _deliver(transfer: Transfer, values: torch.Tensor, write: View) -> None:
    for target in transfer.targets:
        write(target).copy_(values)


def _pack(
    transfers: Sequence[Transfer], value: Callable[[Transfer], torch.Tensor], device: torch.device
) -> torch.Tensor:
    buffer = torch.empty(_packed_bytes(transfers), dtype=torch.uint8, device=device)
    for transfer, piece in _pieces(transfers, buffer):
        piece.copy_(value(transfer))
    return buffer


def _pieces(
    transfers: Sequence[Transfer], buffer: torch.Tensor
) -> Iterator[tuple[Transfer, torch.Tensor]]:
    """Yields each transfer with its part of a packed buffer, shaped and typed."""
    offset = 0
    for transfer in transfers:
        raw = buffer[offset : offset + transfer.nbytes]
        yield transfer, raw.view(transfer.spec.dtype).view(transfer.box.shape)
        offset += _aligned(transfer.nbytes)


def _packed_bytes(transfers: Sequence[Transfer]) -> int:
    return sum(_aligned(transfer.nbytes) for transfer in transfers)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _global_rank(peer: int, group: dist.ProcessGroup | None) -> int:
    return peer if group is None else dist.get_global_rank(group, peer)
