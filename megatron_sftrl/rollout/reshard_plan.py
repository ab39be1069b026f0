"""Who sends which part of which tensor to whom when weights move from the trainer to a rollout engine.

Pure planning on regions of Hugging Face tensors: every rank computes the whole plan from the same gathered
descriptions, so no rank asks another during an update. A part comes from one rank that holds it: the receiver
itself if it can, then a rank on its host, else any; equal choices take turns, so that holders share the work.

A round is one exchange of messages. Its tensors follow each other in the model; no rank packs or receives
more than `bucket_bytes` in it. A tensor too large for that is cut into runs of rows, one round each (a row
that is too large on its own travels whole).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_sftrl.errors import UserError, first_of
from megatron_sftrl.models.tensors import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What one rank, on the machine `host`, holds of each Hugging Face tensor of the live weights."""

    host: str
    regions: Mapping[str, tuple[Region, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A region of a tensor on its way; source == receiver is a copy within the rank."""

    source: int
    receiver: int
    region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRegion:
    name: str
    region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One rank's part in one exchange of messages.

    Args:
        fills: whole tensors, or rows of one, for which this round brings what the rank wants, in the model's
            order.
        sends, receives: the one message to, and from, each other rank, in the order of the message.
        copies: what the rank itself holds.
    """

    fills: tuple[NamedRegion, ...]
    sends: Mapping[int, tuple[NamedRegion, ...]]
    receives: Mapping[int, tuple[NamedRegion, ...]]
    copies: tuple[NamedRegion, ...]


@dataclass(slots=True)
class _OpenRound:
    fills: list[NamedRegion] = field(default_factory=list)
    sends: dict[int, list[NamedRegion]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[int, list[NamedRegion]] = field(default_factory=lambda: defaultdict(list))
    copies: list[NamedRegion] = field(default_factory=list)
    load: int = 0


def plan_rounds(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Sequence[Mapping[str, Region]],
    holdings: Sequence[Holdings],
    *,
    rank: int,
    element_bytes: int,
    bucket_bytes: int,
) -> list[Round]:
    """The rounds of `rank`; every rank has equally many, and they fit together.

    Args:
        shapes: every tensor, in the order of the stream.
        wanted: for each rank, the region that it wants of each tensor; none of those that it leaves out.
        holdings: for each rank.
        element_bytes: size of a weight.
        bucket_bytes: most that a rank packs, and most that it receives, in one round.
    Raises:
        UserError: a part of a tensor that no rank holds, or regions that overlap.
    """
    holders = _holders(shapes, holdings)
    hosts = tuple(each.host for each in holdings)
    known: dict[tuple, _Movement] = {}
    closed: list[_OpenRound] = []
    current = _OpenRound()
    for name, shape in shapes.items():
        regions = tuple(each.get(name) or _none_of(shape) for each in wanted)
        key = (shape, regions, tuple(holders[name].items()))
        if key not in known:
            known[key] = _movement(name, shape, regions, holders[name], hosts, rank)
        movement, whole = known[key], Region.of(shape)
        load = movement.load * element_bytes
        if load and current.fills and current.load + load > bucket_bytes:
            closed.append(current)
            current = _OpenRound()
        if load <= bucket_bytes:
            _add(current, NamedRegion(name=name, region=whole), movement.transfers, rank)
            current.load += load
            continue
        if current.fills:
            closed.append(current)
        # A rank sends each row at most fan_out times, and receives it at most once.
        row_bytes = math.prod(shape[1:]) * element_bytes * movement.fan_out
        num_rows = max(1, bucket_bytes // row_bytes)
        for first in range(0, shape[0], num_rows):
            current, rows = _OpenRound(), whole.along(0, first, first + num_rows)
            _add(current, NamedRegion(name=name, region=rows), movement.transfers, rank)
            closed.append(current)
        current = _OpenRound()
    return [_closed(each) for each in [*closed, *([current] if current.fills else [])]]


def _none_of(shape: Sequence[int]) -> Region:
    return Region.of((0,) * len(shape))


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
) -> dict[str, dict[Region, tuple[int, ...]]]:
    """For each tensor the regions that exist and the ranks that hold each, checked to be the whole tensor."""
    holders: dict[str, dict[Region, list[int]]] = {name: {} for name in shapes}
    for rank, each in enumerate(holdings):
        for name, regions in each.regions.items():
            for region in dict.fromkeys(regions):
                holders[name].setdefault(region, []).append(rank)
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
        name: {region: tuple(ranks) for region, ranks in sorted(held.items())}
        for name, held in holders.items()
    }


def tiling_problem(shape: tuple[int, ...], regions: Sequence[Region]) -> str | None:
    """None if the regions make up the tensor, each element in exactly one; else what is wrong.

    The cuts of all regions divide the tensor into cells, and each region marks its own.
    """
    whole = Region.of(shape)
    for region in regions:
        if len(region.start) != len(shape) or whole.intersect(region) != region or not region.numel:
            return f"a part {region.text} that lies outside or is empty"
    edges = [
        sorted({0, size, *(each.start[dim] for each in regions), *(each.stop[dim] for each in regions)})
        for dim, size in enumerate(shape)
    ]
    places = [{edge: index for index, edge in enumerate(each)} for each in edges]
    marked: set[tuple[int, ...]] = set()
    for region in regions:
        spans = zip(places, region.start, region.stop, strict=True)
        for cell in itertools.product(*(range(place[a], place[b]) for place, a, b in spans)):
            if cell in marked:
                return f"the part {region.text} overlaps another"
            marked.add(cell)
    if len(marked) == math.prod(len(each) - 1 for each in edges):
        return None
    return f"{whole.numel - sum(region.numel for region in regions)} elements are held by no rank"


def _movement(
    name: str,
    shape: tuple[int, ...],
    wanted: Sequence[Region],
    holders: Mapping[Region, tuple[int, ...]],
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
        for receiver, region in enumerate(wanted):
            shared = part.intersect(region)
            if not shared.numel:
                continue
            source = receiver
            if receiver not in own:
                candidates = tuple(by_host.get(hosts[receiver], ranks))
                source = candidates[turns[candidates] % len(candidates)]
                turns[candidates] += 1
            transfers.append(Transfer(source=source, receiver=receiver, region=shared))
    received, sent, receivers = defaultdict(int), defaultdict(int), defaultdict(set)
    filled: dict[int, int] = defaultdict(int)
    for each in transfers:
        filled[each.receiver] += each.region.numel
        if each.source != each.receiver:
            received[each.receiver] += each.region.numel
            sent[each.source] += each.region.numel
            receivers[each.source].add(each.receiver)
    for receiver, region in enumerate(wanted):
        # The parts are disjoint and are the whole tensor, so equal volumes mean each element exactly once.
        assert filled[receiver] == region.numel, f"{name} {shape}: rank {receiver} would not get its share"
    return _Movement(
        transfers=tuple(each for each in transfers if rank in (each.source, each.receiver)),
        load=max([0, *received.values(), *sent.values()]),
        fan_out=max([1, *(len(each) for each in receivers.values())]),
    )


def _add(current: _OpenRound, fill: NamedRegion, transfers: Sequence[Transfer], rank: int) -> None:
    current.fills.append(fill)
    for each in transfers:
        part = NamedRegion(name=fill.name, region=each.region.intersect(fill.region))
        if not part.region.numel:
            continue
        if each.source == each.receiver:
            current.copies.append(part)
        elif each.source == rank:
            current.sends[each.receiver].append(part)
        else:
            current.receives[each.source].append(part)


def _closed(each: _OpenRound) -> Round:
    return Round(
        fills=tuple(each.fills),
        sends={rank: tuple(parts) for rank, parts in sorted(each.sends.items())},
        receives={rank: tuple(parts) for rank, parts in sorted(each.receives.items())},
        copies=tuple(each.copies),
    )
