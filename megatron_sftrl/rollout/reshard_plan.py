"""Who sends which part of which tensor to whom when weights move from the trainer to a rollout engine.

Pure planning on boxes of Hugging Face tensors: every rank computes the whole plan from the same gathered
descriptions, so no rank asks another during an update. A part comes from one rank that holds it: the receiver
itself if it can, then a rank on its host, else any; equal choices take turns, so that holders share the work.

A round is one exchange of messages. Its tensors follow each other in the model; no rank packs or receives
more than `bucket_bytes` in it. A tensor too large for that is cut into bands of rows, one round each (a row
that is too large on its own travels whole).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_sftrl.errors import UserError, first_of
from megatron_sftrl.models.engine_shards import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What one rank holds of the live weights.

    Args:
        host: name of its machine.
        boxes: for each Hugging Face tensor of which it holds something, the parts.
    """

    host: str
    boxes: Mapping[str, tuple[Box, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A part of a tensor on its way; source == receiver is a copy within the rank."""

    source: int
    receiver: int
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of the tensor `name`."""

    name: str
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One rank's part in one exchange of messages.

    Args:
        bands: the tensors that this round completes or fills further, in the model's order.
        sends: the pieces of the one message to each other rank, in the order of the message.
        receives: likewise from each other rank.
        copies: the pieces that the rank itself holds.
    """

    bands: tuple[Band, ...]
    sends: Mapping[int, tuple[Piece, ...]]
    receives: Mapping[int, tuple[Piece, ...]]
    copies: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Rows of a tensor that one round brings; is_last completes it."""

    name: str
    rows: tuple[int, int]
    is_last: bool


@dataclass(slots=True)
class _OpenRound:
    bands: list[Band] = field(default_factory=list)
    sends: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    copies: list[Piece] = field(default_factory=list)
    load: int = 0


def plan_rounds(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Sequence[Mapping[str, Box]],
    holdings: Sequence[Holdings],
    *,
    rank: int,
    element_bytes: int,
    bucket_bytes: int,
) -> list[Round]:
    """The rounds of `rank`; every rank has equally many, and they fit together.

    Args:
        shapes: every tensor, in the order of the stream.
        wanted: for each rank, the box that it wants of each tensor.
        holdings: for each rank.
        rank: whose rounds.
        element_bytes: size of a weight.
        bucket_bytes: most that a rank packs, and most that it receives, in one round.
    Raises:
        UserError: a part of a tensor that no rank holds, or that ranks hold in parts that overlap.
    """
    holders = _holders(shapes, holdings)
    hosts = tuple(each.host for each in holdings)
    known: dict[tuple, _Movement] = {}
    closed: list[_OpenRound] = []
    current = _OpenRound()
    for name, shape in shapes.items():
        boxes = tuple(each[name] for each in wanted)
        key = (shape, boxes, tuple(holders[name].items()))
        if key not in known:
            known[key] = _movement(name, shape, boxes, holders[name], hosts, rank)
        movement = known[key]
        load = movement.load * element_bytes
        if load and current.bands and current.load + load > bucket_bytes:
            closed.append(current)
            current = _OpenRound()
        if load <= bucket_bytes:
            _add(current, name, (0, shape[0]), shape[0], movement.transfers, rank)
            current.load += load
            continue
        if current.bands:
            closed.append(current)
        # A rank sends each row at most fan_out times, and receives it at most once.
        row_bytes = math.prod(shape[1:]) * element_bytes * movement.fan_out
        for rows in _bands(shape[0], max(1, bucket_bytes // row_bytes)):
            current = _OpenRound()
            _add(current, name, rows, shape[0], movement.transfers, rank)
            closed.append(current)
        current = _OpenRound()
    return [_closed(each) for each in [*closed, *([current] if current.bands else [])]]


def volume(box: Box) -> int:
    """Elements of a box."""
    return math.prod(max(0, stop - start) for start, stop in box)


def intersection(one: Box, other: Box) -> Box:
    """What two boxes share; a volume of 0 if nothing."""
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Movement:
    """How a tensor travels.

    Args:
        transfers: from or to the planning rank.
        load: most elements that one rank sends, or receives.
        fan_out: most ranks that one rank sends to, at least 1.
    """

    transfers: tuple[Transfer, ...]
    load: int
    fan_out: int


def _holders(
    shapes: Mapping[str, tuple[int, ...]], holdings: Sequence[Holdings]
) -> dict[str, dict[Box, tuple[int, ...]]]:
    """For each tensor the parts that exist and the ranks that hold each, checked to be the whole tensor."""
    holders: dict[str, dict[Box, list[int]]] = {name: {} for name in shapes}
    for rank, each in enumerate(holdings):
        for name, boxes in each.boxes.items():
            for box in dict.fromkeys(boxes):
                holders[name].setdefault(box, []).append(rank)
    problems, proved = [], set()
    for name, shape in shapes.items():
        pattern = (shape, tuple(holders[name]))
        if pattern not in proved and (problem := tiling_problem(shape, tuple(holders[name]))):
            problems.append(f"{name} {list(shape)}: {problem}")
        proved.add(pattern)
    if problems:
        heading = "the ranks' weights do not make up the model that the engine needs:"
        raise UserError("\n  ".join([heading, *first_of(problems)]))
    return {
        name: {box: tuple(ranks) for box, ranks in sorted(parts.items())} for name, parts in holders.items()
    }


def tiling_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """None if the boxes make up the tensor, each element in exactly one; else what is wrong.

    The cuts of all boxes divide the tensor into cells, and each box marks its own.
    """
    whole = tuple((0, size) for size in shape)
    for box in boxes:
        if len(box) != len(shape) or intersection(box, whole) != box or not volume(box):
            return f"a part {list(box)} that lies outside or is empty"
    cuts = [
        sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(shape)
    ]
    places = [{edge: index for index, edge in enumerate(edges)} for edges in cuts]
    marked: set[tuple[int, ...]] = set()
    for box in boxes:
        for cell in _cells([(places[dim][a], places[dim][b]) for dim, (a, b) in enumerate(box)]):
            if cell in marked:
                return f"the part {list(box)} overlaps another"
            marked.add(cell)
    if len(marked) == math.prod(len(edges) - 1 for edges in cuts):
        return None
    return f"{math.prod(shape) - sum(volume(box) for box in boxes)} elements are held by no rank"


def _cells(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    if not ranges:
        yield ()
        return
    for first in range(*ranges[0]):
        for rest in _cells(ranges[1:]):
            yield (first, *rest)


def _movement(
    name: str,
    shape: tuple[int, ...],
    wanted: Sequence[Box],
    holders: Mapping[Box, tuple[int, ...]],
    hosts: Sequence[str],
    rank: int,
) -> _Movement:
    transfers: list[Transfer] = []
    for part, ranks in holders.items():
        turns: dict[tuple[int, ...], int] = defaultdict(int)
        by_host: dict[str, list[int]] = defaultdict(list)
        for holder in ranks:
            by_host[hosts[holder]].append(holder)
        own = set(ranks)
        for receiver, box in enumerate(wanted):
            shared = intersection(part, box)
            if not volume(shared):
                continue
            source = receiver
            if receiver not in own:
                candidates = tuple(by_host.get(hosts[receiver], ranks))
                source = candidates[turns[candidates] % len(candidates)]
                turns[candidates] += 1
            transfers.append(Transfer(source=source, receiver=receiver, box=shared))
    received, sent, receivers = defaultdict(int), defaultdict(int), defaultdict(set)
    filled: dict[int, int] = defaultdict(int)
    for each in transfers:
        filled[each.receiver] += volume(each.box)
        if each.source != each.receiver:
            received[each.receiver] += volume(each.box)
            sent[each.source] += volume(each.box)
            receivers[each.source].add(each.receiver)
    for receiver, box in enumerate(wanted):
        # The parts are disjoint and are the whole tensor, so equal volumes mean each element exactly once.
        assert filled[receiver] == volume(box), f"{name} {shape}: rank {receiver} would not get its share"
    return _Movement(
        transfers=tuple(each for each in transfers if rank in (each.source, each.receiver)),
        load=max([0, *received.values(), *sent.values()]),
        fan_out=max([1, *(len(each) for each in receivers.values())]),
    )


def _bands(num_rows: int, most: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, most):
        yield start, min(num_rows, start + most)


def _add(
    current: _OpenRound,
    name: str,
    rows: tuple[int, int],
    num_rows: int,
    transfers: Sequence[Transfer],
    rank: int,
) -> None:
    current.bands.append(Band(name=name, rows=rows, is_last=rows[1] == num_rows))
    for each in transfers:
        box = ((max(rows[0], each.box[0][0]), min(rows[1], each.box[0][1])), *each.box[1:])
        if not volume(box):
            continue
        piece = Piece(name=name, box=box)
        if each.source == each.receiver:
            current.copies.append(piece)
        elif each.source == rank:
            current.sends[each.receiver].append(piece)
        else:
            current.receives[each.source].append(piece)


def _closed(each: _OpenRound) -> Round:
    return Round(
        bands=tuple(each.bands),
        sends={rank: tuple(pieces) for rank, pieces in sorted(each.sends.items())},
        receives={rank: tuple(pieces) for rank, pieces in sorted(each.receives.items())},
        copies=tuple(each.copies),
    )
