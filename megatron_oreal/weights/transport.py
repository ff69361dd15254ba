"""Carries out a plan: in each round one packed buffer and one send a pair of ranks, all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from megatron_oreal.weights.geometry import Region
    from megatron_oreal.weights.plan import RankRound, Transfer

    View = Callable[[Region], torch.Tensor]  # the elements of `region.local`, not a copy

_ALIGNMENT = 16  # bytes: every piece of a packed buffer may be viewed as any dtype


def region_view(tensors: Mapping[str, torch.Tensor]) -> View:
    """Returns a view function over tensors by their local names."""
    return lambda region: tensors[region.key].detach()[region.local.slices]


def execute(
    rounds: Sequence[RankRound],
    read: View,
    write: View,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
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
    """
    for round_ in rounds:
        _run_round(round_, read, write, device=device, group=group)


def stream_full_tensors(
    rounds: Sequence[RankRound],
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields whole Hugging Face tensors `(name, tensor)`, round by round, in the plan's order.

    Collective over `group` (None: the world), whose ranks the plan numbers: every rank must
    exhaust the iterator, also one that receives nothing and for which it yields nothing.

    Args:
        rounds: `plan.part_of(rank)` of a plan whose targets are whole tensors.
        tensors: This rank's parameters by their local names.
        device: Where the tensors are built.
        group: The process group.
    """
    read = region_view(tensors)
    for round_ in rounds:
        whole = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for spec in round_.tensors
        }
        _run_round(round_, read, region_view(whole), device=device, group=group)
        yield from whole.items()
        whole.clear()  # or two rounds would live side by side


def _run_round(
    round_: RankRound,
    read: View,
    write: View,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> None:
    outgoing = {peer: _pack(transfers, read, device) for peer, transfers in round_.sends.items()}
    incoming = {
        peer: torch.empty(_packed_bytes(transfers), dtype=torch.uint8, device=device)
        for peer, transfers in round_.receives.items()
    }
    operations = [
        dist.P2POp(operation, buffer, _global_rank(peer, group), group)
        for operation, buffers in ((dist.isend, outgoing), (dist.irecv, incoming))
        for peer, buffer in buffers.items()
    ]
    pending = dist.batch_isend_irecv(operations) if operations else []
    for transfer in round_.copies:
        write(transfer.target).copy_(read(transfer.source))
    for work in pending:
        work.wait()
    for peer, transfers in round_.receives.items():
        for transfer, piece in _pieces(transfers, incoming[peer]):
            write(transfer.target).copy_(piece)


def _pack(transfers: Sequence[Transfer], read: View, device: torch.device) -> torch.Tensor:
    buffer = torch.empty(_packed_bytes(transfers), dtype=torch.uint8, device=device)
    for transfer, piece in _pieces(transfers, buffer):
        piece.copy_(read(transfer.source))
    return buffer


def _pieces(
    transfers: Sequence[Transfer], buffer: torch.Tensor
) -> Iterator[tuple[Transfer, torch.Tensor]]:
    """Yields each transfer with its part of a packed buffer, shaped and typed."""
    offset = 0
    for transfer in transfers:
        raw = buffer[offset : offset + transfer.nbytes]
        yield transfer, raw.view(transfer.dtype).view(transfer.target.box.shape)
        offset += _aligned(transfer.nbytes)


def _packed_bytes(transfers: Sequence[Transfer]) -> int:
    return sum(_aligned(transfer.nbytes) for transfer in transfers)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _global_rank(peer: int, group: dist.ProcessGroup | None) -> int:
    return peer if group is None else dist.get_global_rank(group, peer)
