"""A run of consecutive elements of a tensor, as the few boxes that a sharded checkpoint can name.

The distributed optimizer owns flat ranges that respect no row. Cut into boxes, such a range is stored
under the parameter's own coordinates, and any other layout can read its share of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangular part of a tensor whose elements are consecutive in memory.

    Args:
        offset: of its first element, per dimension.
        shape: its size, per dimension.
        start: of its first element in the flattened tensor.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut elements [start, stop) of a contiguous tensor into boxes, in order; at most 2 ndim - 1 of them.

    For a matrix: the end of a row, whole rows, the beginning of a row.

    Args:
        shape: of the tensor, at least one dimension.
        start, stop: element indices in the flattened tensor, 0 <= start <= stop <= numel.
    """
    assert shape and 0 <= start <= stop <= math.prod(shape)
    yield from _boxes(shape, start, stop, base=0)


def _boxes(shape: tuple[int, ...], start: int, stop: int, *, base: int) -> Iterator[Box]:
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box(offset=(start,), shape=(stop - start,), start=base + start)
        return
    inner = math.prod(shape[1:])
    first_whole, last_whole = -(-start // inner), stop // inner
    if first_whole > last_whole:
        # The range lies inside one row.
        yield from _row(shape, last_whole, start, stop, inner, base)
        return
    yield from _row(shape, first_whole - 1, start, first_whole * inner, inner, base)
    if first_whole < last_whole:
        yield Box(
            offset=(first_whole, *(0 for _ in shape[1:])),
            shape=(last_whole - first_whole, *shape[1:]),
            start=base + first_whole * inner,
        )
    yield from _row(shape, last_whole, last_whole * inner, stop, inner, base)


def _row(shape: tuple[int, ...], row: int, start: int, stop: int, inner: int, base: int) -> Iterator[Box]:
    origin = row * inner
    for box in _boxes(shape[1:], start - origin, stop - origin, base=base + origin):
        yield Box(offset=(row, *box.offset), shape=(1, *box.shape), start=box.start)
