"""Shares of several sources: how many rows of each an epoch takes, and which ones come when.

    total   = min over sources of amount / weight        the amount is in learned tokens, or in rows
    rows    = size * (weight * total) / amount           of each source, to the nearest row

So an epoch ends when the source that is scarcest for its weight has been seen once. The others are not cut
down to a part of their rows: each epoch goes on in a source where the one before has stopped, and a row comes
again when all rows of its source have come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Rows of S sources, one source behind the other: [S] how many there are, and how many an epoch takes."""

    sizes: tuple[int, ...]
    taken: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.taken)

    def epoch(self, epoch: int, *, seed: int, shuffle: bool) -> NDArray[np.int64]:
        """[num_rows] int64, the rows of one epoch in order; a pure function of its arguments.

        Without `shuffle` each source is in the order of its files, its rows evenly spread over the epoch.
        """
        parts = self.rows_of_sources(epoch, seed=seed, shuffle=shuffle)
        joined = np.concatenate(parts)
        if shuffle:
            return joined[permutation(len(joined), seed, epoch)]
        places = np.concatenate([(np.arange(taken) + 0.5) / taken for taken in self.taken])
        return joined[np.argsort(places, kind="stable")]

    def rows_of_sources(self, epoch: int, *, seed: int, shuffle: bool) -> list[NDArray[np.int64]]:
        """Of each source the rows that an epoch takes of it, in its own order."""
        parts, first = [], 0
        for source, (size, taken) in enumerate(zip(self.sizes, self.taken, strict=True)):
            start = epoch * taken
            passes = range(start // size, (start + taken - 1) // size + 1)
            rows = [_pass(size, seed, number, source) if shuffle else np.arange(size) for number in passes]
            skipped = start - passes[0] * size
            parts.append(first + np.concatenate(rows)[skipped : skipped + taken])
            first += size
        return parts


def permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[R] int64, order of the rows in one epoch, counted from 0.

    Ranks of raw Philox output: numpy guarantees the bits of a bit generator for ever, but not those of
    `Generator.permutation` (NEP 19), and an order must survive an upgrade between two halves of a run.
    """
    return _ranks(np.random.Philox(key=np.array([seed, epoch], np.uint64)), num_rows)


def _pass(size: int, seed: int, number: int, source: int) -> NDArray[np.int64]:
    """The order of a source's rows in its pass `number`, from bits that no epoch's permutation uses."""
    counter = np.array([0, 0, 0, source + 1], np.uint64)
    return _ranks(np.random.Philox(key=np.array([seed, number], np.uint64), counter=counter), size)


def _ranks(bits: np.random.Philox, count: int) -> NDArray[np.int64]:
    return np.argsort(bits.random_raw(count), kind="stable")


def plan_mixture(
    weights: Sequence[float], *, sizes: Sequence[int], amounts: Sequence[int], paths: Sequence[Path]
) -> Mixture:
    """What an epoch takes so that the paths of data.train have their weights.

    `sizes` and `amounts` have of each path its rows, and what is shared out: its learned tokens, or rows.

    Raises:
        UserError: a path has no rows, or less than one of its rows would be taken.
    """
    if empty := [str(path) for path, size in zip(paths, sizes, strict=True) if not size]:
        raise UserError(f"data.train: no row is left of {', '.join(empty)}; remove it, or write it again")
    total = min(amount / weight for amount, weight in zip(amounts, weights, strict=True))
    taken = []
    for path, weight, size, amount in zip(paths, weights, sizes, amounts, strict=True):
        rows = min(size, round(size * (weight * total / amount)))
        if not rows:
            raise UserError(
                f"data.train: at its weight of {weight:g} an epoch takes less than one row of {path}; raise "
                "the weight, remove the path, or add rows to the others"
            )
        taken.append(rows)
    return Mixture(sizes=tuple(sizes), taken=tuple(taken))


def with_mixture(fingerprint: str, mixture: Mixture | None) -> str:
    """The fingerprint of rows, or of what a mixture takes of them: equal means the same order."""
    if mixture is None:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {mixture.sizes} {mixture.taken}".encode()).hexdigest()


def describe_mixture(mixture: Mixture, amounts: NDArray[np.int64], unit: str, paths: Sequence[Path]) -> str:
    """What each path has of an epoch's rows, whose `amounts` are given in the order of the rows in it."""
    ends = np.cumsum(mixture.taken)[:-1]
    reached = [part.sum() / amounts.sum() for part in np.split(amounts, ends)]
    told = [
        f"{taken:,} of {size:,} rows of {path} ({share:.1%} of the {unit})"
        for taken, size, path, share in zip(mixture.taken, mixture.sizes, paths, reached, strict=True)
    ]
    return f"an epoch takes {', '.join(told)}"
