"""Which row comes when: a pure function of the seed, so that a run resumes at the exact sample.

The only state of the order is the number of samples consumed. It knows nothing about ranks or layouts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.errors import UserError


class SampleOrder:
    """An endless sequence of row indices, a new permutation each epoch. Owns one memoised permutation."""

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        """Fix the order.

        Args:
            num_rows: R, at least 1.
            seed: the run's seed, at least 0.
            shuffle: False keeps the order of the files in every epoch.
        Raises:
            UserError: there is no row, or the seed is negative.
        """
        if num_rows < 1 or seed < 0:
            raise UserError(f"sample order: expected num_rows >= 1 and seed >= 0, got {num_rows} and {seed}")
        self.num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.zeros(0, np.int64)

    def row(self, position: int) -> int:
        """The row at `position` of the endless sequence.

        Args:
            position: samples consumed before it.
        Returns:
            0 <= row < num_rows.
        """
        epoch, inside = divmod(position, self.num_rows)
        if not self._shuffle:
            return inside
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, epoch_permutation(self.num_rows, self._seed, epoch)
        return int(self._permutation[inside])

    def rows(self, start: int, count: int) -> list[int]:
        """`count` rows from position `start` on; an epoch's end is crossed without a gap.

        Args:
            start: samples consumed before them.
            count: how many.
        Returns:
            Row indices.
        """
        return [self.row(position) for position in range(start, start + count)]


def epoch_permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of the rows in one epoch.

    Ranks of raw Philox output: numpy guarantees the bits of a bit generator for ever, but not those of
    `Generator.permutation` (NEP 19), and an order must survive an upgrade between two halves of a run.

    Args:
        num_rows: R.
        seed: the run's seed.
        epoch: from 0.
    Returns:
        [R] int64, a permutation.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


def num_training_steps(
    *,
    steps: int | None,
    epochs: int | None,
    num_rows: int,
    global_size: int,
    size_key: str = "batch.global_size",
) -> int:
    """Optimizer steps of a run.

    Args:
        steps: train.steps.
        epochs: train.epochs; the incomplete last batch of the run is left out.
        num_rows: rows of the training data.
        global_size: sequences per step.
        size_key: the setting that global_size comes from, for the message.
    Returns:
        Number of steps.
    Raises:
        UserError: not exactly one of steps and epochs, or the epochs do not fill one batch.
    """
    if (steps is None) == (epochs is None):
        raise UserError("give exactly one of train.steps and train.epochs")
    if steps is not None:
        return steps
    total = (epochs or 0) * num_rows
    if total < global_size:
        raise UserError(
            f"train.epochs = {epochs} over {num_rows} rows gives {total} sequences, expected at least "
            f"{size_key} = {global_size}; lower {size_key} or raise train.epochs"
        )
    return total // global_size
