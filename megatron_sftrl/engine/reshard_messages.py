"""One exchange of messages between ranks: pack and send, later receive; one message for each pair of ranks.

Between the two a rank unpacks the exchange before: what travels does not wait for memory to be copied.
"""

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


class Exchange:
    """The messages of a round, on their way from the moment this is made.

    Every rank makes the exchange of a round, finishes the one before, and so on. Gloo and NCCL deliver the
    messages of a pair of ranks in the order of the calls, and the plan gives both ends the same order, so no
    tags are needed.

    Args:
        each: the rank's part in the round.
        weights: this rank's.
        dtype, device: of the weights.
        has_checksums: send the sums of all pieces, too.
    """

    def __init__(
        self,
        each: Round,
        weights: LiveWeights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        has_checksums: bool,
    ) -> None:
        self._receives = each.receives
        self._inbox = {
            source: torch.empty(_num_elements(pieces), dtype=dtype, device=device)
            for source, pieces in each.receives.items()
        }
        self._outbox = {}
        for receiver, pieces in each.sends.items():
            self._outbox[receiver] = torch.empty(_num_elements(pieces), dtype=dtype, device=device)
            for piece, place in _places(pieces, self._outbox[receiver]):
                place.copy_(weights.read(piece.name, piece.box))
        self._sums: dict[int, Tensor] = {}
        self._own_sums: dict[int, Tensor] = {}
        if has_checksums:
            self._sums = {
                source: torch.empty(len(pieces), dtype=torch.int64, device=device)
                for source, pieces in each.receives.items()
            }
            self._own_sums = {
                receiver: torch.tensor(
                    [checksum(weights.read(piece.name, piece.box)) for piece in pieces], device=device
                )
                for receiver, pieces in each.sends.items()
            }
        operations = [
            *_operations(dist.irecv, self._inbox),
            *_operations(dist.isend, self._outbox),
            *_operations(dist.irecv, self._sums),
            *_operations(dist.isend, self._own_sums),
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    @property
    def num_bytes(self) -> int:
        """Of weights on their way, in both directions."""
        return sum(buffer.nbytes for buffer in (*self._inbox.values(), *self._outbox.values()))

    def finish(self) -> Received:
        """Wait for the messages of the others, and for one's own to be sent; called once."""
        for work in self._works:
            work.wait()
        inbox, outbox, self._inbox, self._outbox = self._inbox, self._outbox, {}, {}
        return Received(
            values={
                piece: place
                for source, pieces in self._receives.items()
                for piece, place in _places(pieces, inbox[source])
            },
            checksums={
                piece: total
                for source, totals in self._sums.items()
                for piece, total in zip(self._receives[source], totals.tolist(), strict=True)
            },
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


def _operations(direction: Callable, buffers: Mapping[int, Tensor]) -> Iterator[dist.P2POp]:
    for peer, buffer in buffers.items():
        yield dist.P2POp(direction, buffer, peer)
