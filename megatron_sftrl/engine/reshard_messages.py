"""One exchange of messages between ranks: pack, send, receive; one message for each pair of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.checksums import checksum
from megatron_sftrl.engine.live_weights import LiveWeights
from megatron_sftrl.engine.reshard_plan import Piece, Round, volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What one exchange brought.

    Args:
        values: of each piece, shaped like its box.
        checksums: of each piece, as its holder computed it; empty without checksums.
        num_bytes: received.
        sent_bytes: sent.
    """

    values: Mapping[Piece, Tensor]
    checksums: Mapping[Piece, int]
    num_bytes: int
    sent_bytes: int


def exchange(
    each: Round, weights: LiveWeights, *, dtype: torch.dtype, device: torch.device, has_checksums: bool
) -> Received:
    """Send this rank's pieces and wait for those of the others; every rank of a round calls it.

    Gloo and NCCL deliver the messages of a pair of ranks in the order of the calls, and the plan gives both
    ends the same order, so no tags are needed.
    """
    inbox = {
        source: torch.empty(_num_elements(pieces), dtype=dtype, device=device)
        for source, pieces in each.receives.items()
    }
    outbox = {}
    for receiver, pieces in each.sends.items():
        outbox[receiver] = torch.empty(_num_elements(pieces), dtype=dtype, device=device)
        for piece, place in _places(pieces, outbox[receiver]):
            place.copy_(weights.read(piece.name, piece.box))
    _run([*_operations(dist.irecv, inbox), *_operations(dist.isend, outbox)])
    sums: dict[Piece, int] = {}
    if has_checksums:
        sums = _exchange_checksums(each, weights, device)
    values = {
        piece: place
        for source, pieces in each.receives.items()
        for piece, place in _places(pieces, inbox[source])
    }
    return Received(
        values=values,
        checksums=sums,
        num_bytes=sum(buffer.nbytes for buffer in inbox.values()),
        sent_bytes=sum(buffer.nbytes for buffer in outbox.values()),
    )


def _num_elements(pieces: Sequence[Piece]) -> int:
    return sum(volume(piece.box) for piece in pieces)


def _places(pieces: Sequence[Piece], message: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Each piece and where it lies in the message, as a view of the piece's shape."""
    sizes = [volume(piece.box) for piece in pieces]
    for piece, flat in zip(pieces, message.split(sizes), strict=True):
        yield piece, flat.view([stop - start for start, stop in piece.box])


def _exchange_checksums(each: Round, weights: LiveWeights, device: torch.device) -> dict[Piece, int]:
    inbox = {
        source: torch.empty(len(pieces), dtype=torch.int64, device=device)
        for source, pieces in each.receives.items()
    }
    outbox = {
        receiver: torch.tensor(
            [checksum(weights.read(piece.name, piece.box)) for piece in pieces], device=device
        )
        for receiver, pieces in each.sends.items()
    }
    _run([*_operations(dist.irecv, inbox), *_operations(dist.isend, outbox)])
    return {
        piece: total
        for source, pieces in each.receives.items()
        for piece, total in zip(pieces, inbox[source].tolist(), strict=True)
    }


def _operations(direction: Callable, buffers: Mapping[int, Tensor]) -> Iterator[dist.P2POp]:
    for peer, buffer in buffers.items():
        yield dist.P2POp(direction, buffer, peer)


def _run(operations: list[dist.P2POp]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
