"""Moves the live policy's weights out of the trainer's shards into a rollout engine's, without a checkpoint.

Who holds what is told once, when the Resharder is made; an update then costs the messages for the parts that
a rank's engine needs and the rank does not hold. Where trainer and engine cut alike, there are none. A rank
may hold nothing (it only generates) or want nothing (it only trains).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.live_weights import LiveWeights, live_weights
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import on_every_rank
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.engine_shards import EngineLayout, engine_regions
from megatron_sftrl.models.tensors import Region, hf_boxes, hf_shapes, megatron_tensors
from megatron_sftrl.rollout.reshard_plan import Holdings, NamedRegion, Round, plan_rounds

T = TypeVar("T")

# A sum over the exact bits of a tensor, computed where the tensor lies.


_CHUNK = 2**18
"""Elements at a time: the 64-bit temporaries stay below 8 MiB."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """sum_i (2 i + 1) w_i modulo 2^64 (signed) over the elements' bit patterns w_i, in row-major order.

    The factors are odd, so a change of any one element changes the sum; exchanging two different elements of
    at most 32 bits changes it too, because (w_i - w_j) 2 (i - j) is no multiple of 2^64. The tensor need not
    be contiguous.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        words = flat[start : start + _CHUNK].view(_WORDS[tensor.element_size()]).long()
        place = torch.arange(start, start + words.numel(), device=tensor.device)
        total += (words * (2 * place + 1)).sum()
    return int(total)


# What carries messages between ranks: the default group of the job, where every rank trains and generates.


Buffers = Sequence[tuple[int, Tensor]]
"""Numbers of ranks, and of each the message to it or the memory for the one from it."""


class Wires(Protocol):
    """Ranks that hold weights or want them, numbered from 0, and their messages."""

    @property
    def rank(self) -> int: ...

    def gather(self, mine: T) -> list[T]:
        """What each rank has, by its number; every rank calls it."""
        ...

    def start(self, *, receives: Buffers, sends: Buffers) -> Sequence[dist.Work]:
        """Begin messages; between two ranks they arrive in the order of the calls."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultGroup:
    """Wires between all ranks of the default group."""

    rank: int
    world_size: int

    def gather(self, mine: T) -> list[T]:
        everyone: list[T] = [mine] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def start(self, *, receives: Buffers, sends: Buffers) -> Sequence[dist.Work]:
        operations = [
            *(dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in receives),
            *(dist.P2POp(dist.isend, buffer, peer) for peer, buffer in sends),
        ]
        return dist.batch_isend_irecv(operations) if operations else []


# One exchange of messages between ranks: pack and send, later receive; one message for each pair of ranks.
#
# Between the two a rank unpacks the exchange before: what travels does not wait for memory to be copied.


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What one exchange brought.

    Args:
        values: of each region, of its shape.
        checksums: of each region, as its holder computed it; empty without checksums.
        num_bytes, sent_bytes: received, and sent.
    """

    values: Mapping[NamedRegion, Tensor]
    checksums: Mapping[NamedRegion, int]
    num_bytes: int
    sent_bytes: int


class Exchange:
    """The messages of a round, on their way from the moment this is made.

    Every rank makes the exchange of a round, finishes the one before, and so on. Gloo and NCCL deliver the
    messages of a pair of ranks in the order of the calls, and the plan gives both ends the same order, so no
    tags are needed.

    Args:
        has_checksums: send the sums of all parts, too.
    """

    def __init__(
        self,
        each: Round,
        weights: LiveWeights,
        wires: Wires,
        *,
        dtype: torch.dtype,
        device: torch.device,
        has_checksums: bool,
    ) -> None:
        self._receives = each.receives
        self._inbox = {
            source: torch.empty(_num_elements(parts), dtype=dtype, device=device)
            for source, parts in each.receives.items()
        }
        self._outbox = {}
        self._sums: dict[int, Tensor] = {}
        self._own_sums: dict[int, Tensor] = {}
        for receiver, parts in each.sends.items():
            self._outbox[receiver] = torch.empty(_num_elements(parts), dtype=dtype, device=device)
            sums = []
            for part, place in _places(parts, self._outbox[receiver]):
                value = weights.read(part.name, part.region)
                place.copy_(value)
                if has_checksums:
                    sums.append(checksum(value))
            if has_checksums:
                self._own_sums[receiver] = torch.tensor(sums, device=device)
        if has_checksums:
            self._sums = {
                source: torch.empty(len(parts), dtype=torch.int64, device=device)
                for source, parts in each.receives.items()
            }
        self._works = wires.start(
            receives=[*self._inbox.items(), *self._sums.items()],
            sends=[*self._outbox.items(), *self._own_sums.items()],
        )

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
                part: place
                for source, parts in self._receives.items()
                for part, place in _places(parts, inbox[source])
            },
            checksums={
                part: total
                for source, totals in self._sums.items()
                for part, total in zip(self._receives[source], totals.tolist(), strict=True)
            },
            num_bytes=sum(buffer.nbytes for buffer in inbox.values()),
            sent_bytes=sum(buffer.nbytes for buffer in outbox.values()),
        )


def _num_elements(parts: Sequence[NamedRegion]) -> int:
    return sum(part.region.numel for part in parts)


def _places(parts: Sequence[NamedRegion], message: Tensor) -> Iterator[tuple[NamedRegion, Tensor]]:
    """Each region and where it lies in the message, as a view of its shape."""
    sizes = [part.region.numel for part in parts]
    for part, flat in zip(parts, message.split(sizes), strict=True):
        yield part, flat.view(part.region.shape)


# One update of a rollout engine: the tensors one after another, and the proof that none was missed.
#
#     with resharder.stream() as stream:
#         engine.load(stream)             # for name, tensor in stream: ...
#     resharder.last_report
#
# Every rank opens the stream at the same time. The end of the block is collective: a rank whose engine
# refused a tensor still takes part in the messages of others; then all raise the same ValueError.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardReport:
    """What one update cost this rank; bytes are of weights.

    Args:
        seconds: inside the stream: messages and copies, not the engine's own work on the tensors.
        received_bytes, sent_bytes: from and to other ranks.
        copied_bytes: that the rank already held.
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
        shapes: of every tensor, in the order of the stream, as regions count it (hf_boxes); of fp32 tensors
            among others as many elements of `dtype` as they have bits for.
        yielded: the dtype and shape in which the engine gets it.
        share: the region of each that the rank's engine reads; a tensor without one is not yielded.
        rounds: the rank's exchanges.
        is_checked: fill what the engine does not read with NaN.
        has_checksums: compare the bits of every part at its holder and here.
    """

    shapes: Mapping[str, tuple[int, ...]]
    yielded: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    share: Mapping[str, Region]
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
    filled (`engine_regions`); the rest is memory that was never written (free on the CPU), or NaN in checked
    mode. An engine of tp 1 gets everything.

    Args:
        weights: this rank's live weights; nothing may change them before finish().
        on_finish: called with the report when every rank has finished well.
    """

    def __init__(
        self,
        plan: StreamPlan,
        weights: LiveWeights,
        wires: Wires,
        *,
        on_finish: Callable[[ReshardReport], None],
    ) -> None:
        self._on_finish = on_finish
        self.report: ReshardReport | None = None
        self._plan = plan
        self._weights, self._wires = weights, wires
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
        names = [name for name in self._plan.shapes if name in self._plan.share]
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
            messages, parts = received.num_bytes + underway.num_bytes, _by_name(each, received)
            for fill in each.fills:
                name = fill.name
                if name not in plan.share:
                    continue
                if fill.region.start[0] == 0:
                    whole, filled = self._new(name), 0
                count.peak = max(count.peak, messages + whole.nbytes)
                for part in parts.get(name, ()):
                    self._fill(whole, part, received)
                    filled += part.region.numel
                if fill.region.stop[0] == plan.shapes[name][0]:
                    assert filled == plan.share[name].numel, f"{name}: {filled} elements arrived"
                    count.yielded.append(name)
                    # No reference stays here: the consumer's is the only one.
                    taken, whole = whole, whole.new_empty(0)
                    wanted, shape = plan.yielded[name]
                    yield name, taken.view(wanted).view(shape)
                    del taken
            # Else this round's messages would still be there when the one after the next begins.
            del received, parts

    def _begin(self, number: int) -> Exchange:
        plan = self._plan
        return Exchange(
            plan.rounds[number],
            self._weights,
            self._wires,
            dtype=plan.dtype,
            device=plan.device,
            has_checksums=plan.has_checksums,
        )

    def _new(self, name: str) -> Tensor:
        plan = self._plan
        if plan.is_checked:
            return torch.full(plan.shapes[name], torch.nan, dtype=plan.dtype, device=plan.device)
        return torch.empty(plan.shapes[name], dtype=plan.dtype, device=plan.device)

    def _fill(self, whole: Tensor, part: NamedRegion, received: Received) -> None:
        target = whole[part.region.slices]
        value = received.values.get(part)
        if value is None:
            value = self._weights.read(part.name, part.region)
            self._count.copied += value.nbytes
        target.copy_(value)
        if self._plan.has_checksums:
            expected = received.checksums[part] if part in received.checksums else checksum(value)
            if checksum(target) != expected:
                self._count.problems.append(
                    f"{part.name} {part.region.text} did not arrive as it was sent: checksums differ; "
                    "nothing was generated with it, start again and test the network"
                )


def _by_name(each: Round, received: Received) -> dict[str, list[NamedRegion]]:
    parts: dict[str, list[NamedRegion]] = {}
    for part in (*each.copies, *received.values):
        parts.setdefault(part.name, []).append(part)
    return parts


class Resharder:
    """Streams of the policy's weights for the engine ranks of this job; construction is collective.

    Args:
        held: the weights that this rank gives, as they are when it is called; None where it gives none.
        wanted: the region of each Hugging Face tensor (hf_boxes) that this rank's engine reads, such as
            engine_regions; empty where the rank has no engine.
        wires: between all ranks that give or want.
        bucket_bytes: an update takes at most the memory of two buckets and the largest tensor. (A row of a
            tensor travels whole, however large.)
        is_checked: fill what the engine does not read with NaN, so that a wrong share shows.
        has_checksums: compare the bits of every part at its holder and at its receiver.
    Raises:
        UserError: on every rank: a part of the model that no rank holds or that two hold differently, weights
            of several dtypes.
    """

    def __init__(
        self,
        held: Callable[[], LiveWeights] | None,
        architecture: Architecture,
        wanted: Mapping[str, Region],
        wires: Wires,
        device: torch.device,
        *,
        bucket_bytes: int,
        is_checked: bool = False,
        has_checksums: bool = False,
    ) -> None:
        if bucket_bytes < 1:
            raise UserError(f"bucket_bytes = {bucket_bytes}: at least 1, commonly 256 MiB or more")
        self.last_report: ReshardReport | None = None
        self._held, self._wires = held or _nothing, wires
        weights = self._held()
        self._regions = weights.regions()
        mine = Holdings(host=socket.gethostname(), regions=self._regions)
        everyone = wires.gather((mine, dict(wanted), weights.dtypes()))
        dtypes = set[torch.dtype]().union(*(kinds for _, _, kinds in everyone))
        if len(dtypes) != 1:
            raise UserError(
                f"weights of one dtype are expected, got {sorted(map(str, dtypes))}: set model.dtype"
            )
        (dtype,) = dtypes
        boxes, words = hf_boxes(architecture), torch.float32.itemsize // dtype.itemsize
        fp32 = [each.rows[0].name for each in megatron_tensors(architecture) if each.is_fp32]
        shares = [share for _, share, _ in everyone]
        for name in fp32:
            boxes[name] = Region.of(boxes[name]).stretched(words).stop
            for share in shares:
                if name in share:
                    share[name] = share[name].stretched(words)
        self._plan = StreamPlan(
            shapes=boxes,
            yielded={
                name: (torch.float32 if name in fp32 else dtype, shape)
                for name, shape in hf_shapes(architecture).items()
            },
            share=shares[wires.rank],
            rounds=plan_rounds(
                boxes,
                shares,
                [each for each, _, _ in everyone],
                rank=wires.rank,
                element_bytes=dtype.itemsize,
                # Three messages share two buckets: the received one that is unpacked, and both directions of
                # the exchange that is under way meanwhile.
                bucket_bytes=max(1, 2 * bucket_bytes // 3),
            ),
            dtype=dtype,
            device=device,
            is_checked=is_checked,
            has_checksums=has_checksums,
        )

    def stream(self) -> WeightStream:
        """The weights as they are now: an iterator of (Hugging Face name, tensor), used as a context manager.

        Every rank opens its stream, and ends it, at the same time, after PolicyEngine.gather_parameters().
        Nothing may change the weights before the end.
        """
        weights = self._held()
        assert weights.regions() == self._regions, "the policy's layout changed after the Resharder was made"
        return WeightStream(self._plan, weights, self._wires, on_finish=self._keep)

    def fill(self, weights: LiveWeights) -> None:
        """Write one stream into the shards of another model, whose wanted_by() is what this rank wants."""
        with self.stream() as stream:
            for name, tensor in stream:
                values = tensor.view(self._plan.dtype).view(self._plan.shapes[name])
                for region, part in weights.parts[name].items():
                    part.copy_(values[region.slices])

    def _keep(self, report: ReshardReport) -> None:
        self.last_report = report


def _nothing() -> LiveWeights:
    return LiveWeights(parts={}, added={})


def between_all_ranks(
    chunks: Sequence[LanguageModel],
    architecture: Architecture,
    parallel: ParallelContext,
    layout: EngineLayout,
    *,
    bucket_bytes: int,
    is_checked: bool = False,
    has_checksums: bool = False,
) -> Resharder:
    """A Resharder of a job whose ranks all hold a part of the policy, and form engines in this layout.

    Raises:
        UserError: on every rank: as Resharder, or an engine that cannot cut the model like this.
    """
    assert layout.world_size == parallel.world_size
    return Resharder(
        lambda: live_weights(chunks, architecture),
        architecture,
        engine_regions(architecture, tp=layout.tp, tp_rank=layout.tp_rank(parallel.rank)),
        DefaultGroup(rank=parallel.rank, world_size=parallel.world_size),
        parallel.device,
        bucket_bytes=bucket_bytes,
        is_checked=is_checked,
        has_checksums=has_checksums,
    )


def wanted_by(weights: LiveWeights, architecture: Architecture) -> dict[str, Region]:
    """Of each tensor the smallest region that holds all that a model's shards have of it."""
    whole = hf_boxes(architecture)
    fp32 = {each.rows[0].name for each in megatron_tensors(architecture) if each.is_fp32}
    return {
        name: Region.of(whole[name])
        if name in fp32  # its regions are counted in other words, and it is small
        else Region(
            tuple(map(min, zip(*(each.start for each in parts), strict=True))),
            tuple(map(max, zip(*(each.stop for each in parts), strict=True))),
        )
        for name, parts in weights.parts.items()
    }
