"""One update of a rollout engine: the tensors one after another, and the proof that none was missed.

    with resharder.stream() as stream:
        engine.load(stream)             # for name, tensor in stream: ...
    resharder.last_report

Every rank opens the stream at the same time. The end of the block is collective: a rank whose engine refused
a tensor still takes part in the messages that others wait for, and then the same ValueError is raised
everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_sftrl.engine.checksums import checksum
from megatron_sftrl.engine.live_weights import LiveWeights
from megatron_sftrl.engine.reshard_messages import Exchange, Received
from megatron_sftrl.engine.reshard_plan import Piece, Round, volume
from megatron_sftrl.engine.together import on_every_rank
from megatron_sftrl.models.engine_shards import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardReport:
    """What one update cost this rank.

    Args:
        seconds: inside the stream: messages and copies, not the engine's own work on the tensors.
        received_bytes: of weights, from other ranks.
        sent_bytes: of weights, to other ranks.
        copied_bytes: of weights that the rank already held.
        peak_bytes: most that message buffers and the tensor being filled occupied at once.
        num_tensors: yielded.
        num_rounds: exchanges of messages.
    """

    seconds: float
    received_bytes: int
    sent_bytes: int
    copied_bytes: int
    peak_bytes: int
    num_tensors: int
    num_rounds: int

    @property
    def gigabytes_per_second(self) -> float:
        """Weights that reached the engine, 10^9 bytes a second."""
        return (self.received_bytes + self.copied_bytes) / max(self.seconds, 1e-9) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """What a rank's stream yields and where it comes from.

    Args:
        shapes: of every tensor, in the order of the stream.
        share: the box of each that the rank's engine reads.
        rounds: the rank's exchanges.
        dtype: of the weights.
        device: of the weights.
        is_checked: fill what the engine does not read with NaN.
        has_checksums: compare the bits of every piece at its holder and here.
    """

    shapes: Mapping[str, tuple[int, ...]]
    share: Mapping[str, Box]
    rounds: Sequence[Round]
    dtype: torch.dtype
    device: torch.device
    is_checked: bool
    has_checksums: bool


@dataclass(slots=True)
class _Count:
    seconds: float = 0.0
    received: int = 0
    sent: int = 0
    copied: int = 0
    peak: int = 0
    yielded: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class WeightStream:
    """Iterator of (Hugging Face name, tensor) for this rank's engine, and a context manager.

    A tensor has the whole Hugging Face shape and the trainer's dtype, and owns its memory: the stream never
    touches it again, so a consumer may keep it. Of its elements only the share of this rank's engine is
    filled (`engine_boxes`); the rest is memory that was never written, or NaN in checked mode. On the CPU
    pages never written cost nothing. An engine of tp 1 gets everything.

    Args:
        plan: of this rank.
        weights: this rank's live weights; nothing may change them before finish().
        on_finish: called with the report when every rank has finished well.
    """

    def __init__(
        self, plan: StreamPlan, weights: LiveWeights, *, on_finish: Callable[[ReshardReport], None]
    ) -> None:
        self._on_finish = on_finish
        self.report: ReshardReport | None = None
        self._plan = plan
        self._weights = weights
        self._count = _Count()
        self._items = self._produce()
        self._is_broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._is_broken:
            self._finish(f"{type(error).__name__}: {error}", cause=error)
        elif error is None:
            self.finish()

    def __iter__(self) -> Self:
        return self

    @torch.no_grad()
    def __next__(self) -> tuple[str, Tensor]:
        start = time.perf_counter()
        try:
            return next(self._items)
        except StopIteration:
            raise
        except BaseException:
            # A message failed: the others are not where this rank is, and waiting for them would hang.
            self._is_broken = True
            raise
        finally:
            self._count.seconds += time.perf_counter() - start

    def finish(self) -> ReshardReport:
        """Prove that every tensor was taken exactly once, on every rank; collective, called once.

        Returns:
            What the update cost this rank.
        Raises:
            RuntimeError: on every rank: a rank did not take every tensor, or received other bits than were
                sent.
        """
        return self._finish(None, cause=None)

    def _finish(self, failure: str | None, *, cause: Exception | None) -> ReshardReport:
        if self.report is not None:
            return self.report
        num_taken = len(self._count.yielded)
        for _ in self:  # messages that other ranks wait for
            pass
        on_every_rank(lambda: self._check(num_taken, failure, cause))
        if self._plan.device.type == "cuda":
            start = time.perf_counter()
            torch.cuda.synchronize(self._plan.device)
            self._count.seconds += time.perf_counter() - start
        count = self._count
        self.report = ReshardReport(
            seconds=count.seconds,
            received_bytes=count.received,
            sent_bytes=count.sent,
            copied_bytes=count.copied,
            peak_bytes=count.peak,
            num_tensors=len(count.yielded),
            num_rounds=len(self._plan.rounds),
        )
        self._on_finish(self.report)
        return self.report

    def _check(self, num_taken: int, failure: str | None, cause: Exception | None) -> None:
        names = list(self._plan.shapes)
        if failure is not None:
            after = f"after {num_taken} of {len(names)} tensors"
            raise RuntimeError(f"the rollout engine stopped {after}: {failure}") from cause
        if num_taken < len(names):
            raise RuntimeError(
                f"the rollout engine took {num_taken} of {len(names)} tensors; the first it left is "
                f"{names[num_taken]}: iterate to the end before finish()"
            )
        assert self._count.yielded == names
        if self._count.problems:
            raise RuntimeError("\n".join(self._count.problems))

    def _produce(self) -> Iterator[tuple[str, Tensor]]:
        plan, count = self._plan, self._count
        whole, filled = torch.empty(0, dtype=plan.dtype, device=plan.device), 0
        underway = self._begin(0)
        for number, each in enumerate(plan.rounds):
            count.peak = max(count.peak, underway.num_bytes + whole.nbytes)
            received = underway.finish()
            count.received += received.num_bytes
            count.sent += received.sent_bytes
            if number + 1 < len(plan.rounds):
                # It travels while this rank unpacks, and while the engine loads.
                underway = self._begin(number + 1)
            messages, pieces = received.num_bytes + underway.num_bytes, _by_name(each, received)
            for band in each.bands:
                if band.rows[0] == 0:
                    whole, filled = self._new(band.name), 0
                count.peak = max(count.peak, messages + whole.nbytes)
                for piece in pieces.get(band.name, ()):
                    self._fill(whole, piece, received)
                    filled += volume(piece.box)
                if band.is_last:
                    assert filled == volume(plan.share[band.name]), f"{band.name}: {filled} elements arrived"
                    count.yielded.append(band.name)
                    # No reference stays here: the consumer's is the only one.
                    taken, whole = whole, whole.new_empty(0)
                    yield band.name, taken
                    del taken
            # Else this round's messages would still be there when the one after the next begins.
            del received, pieces

    def _begin(self, number: int) -> Exchange:
        plan = self._plan
        return Exchange(
            plan.rounds[number],
            self._weights,
            dtype=plan.dtype,
            device=plan.device,
            has_checksums=plan.has_checksums,
        )

    def _new(self, name: str) -> Tensor:
        plan = self._plan
        if plan.is_checked:
            return torch.full(plan.shapes[name], torch.nan, dtype=plan.dtype, device=plan.device)
        return torch.empty(plan.shapes[name], dtype=plan.dtype, device=plan.device)

    def _fill(self, whole: Tensor, piece: Piece, received: Received) -> None:
        target = whole[tuple(slice(start, stop) for start, stop in piece.box)]
        value = received.values.get(piece)
        if value is None:
            value = self._weights.read(piece.name, piece.box)
            self._count.copied += value.nbytes
        target.copy_(value)
        if self._plan.has_checksums:
            expected = received.checksums[piece] if piece in received.checksums else checksum(value)
            if checksum(target) != expected:
                self._count.problems.append(
                    f"{piece.name} {[list(bounds) for bounds in piece.box]} did not arrive as it was sent: "
                    "checksums differ; nothing was generated with it, start again and test the network"
                )


def _by_name(each: Round, received: Received) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for piece in (*each.copies, *received.values):
        pieces.setdefault(piece.name, []).append(piece)
    return pieces
