"""The micro-batches of one optimizer step, for one data-parallel rank.

All rows are tokenized before the first step, so that building a step costs about a millisecond; it reads
nothing but memory-mapped arrays, and the same step gives the same batches however often it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.config.schema import BatchSection
from megatron_sftrl.data.dataset import Dataset
from megatron_sftrl.data.examples import Example
from megatron_sftrl.data.mixture import Mixture, permutation
from megatron_sftrl.data.packing import (
    Assignment,
    Carried,
    Piece,
    SharedPrompt,
    StepNormalization,
    build_token_batch,
    padded_batch_length,
    pieces_of,
    plan_microbatches,
    plan_sharing_microbatches,
    predicting_length,
)
from megatron_sftrl.errors import UserError
from megatron_sftrl.types import TokenBatch

# One optimizer step laid out over ranks and micro-batches: the same for demonstrations and for rollouts.


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """What the layout of the ranks asks of a batch.

    Args:
        sequence_multiple_of: each sequence is padded to a multiple of it (2 * cp when cp > 1).
        pad_to_multiple_of: T is a multiple of it (tp * cp under sequence parallelism, more with train.fp8).
        microbatch_multiple: so is the number of micro-batches (pp under virtual pipeline parallelism).
        uniform_length: all micro-batches of a step, on all ranks, have the same T (pp > 1).
    """

    dp_rank: int = 0
    dp_size: int = 1
    sequence_multiple_of: int = 1
    pad_to_multiple_of: int = 1
    microbatch_multiple: int = 1
    uniform_length: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """One step of one rank, and facts about the whole step that are equal on all ranks.

    Args:
        batches: this rank's micro-batches; their token_weight sums to 1 over the step and all ranks (over
            all steps, in an evaluation).
        rows: index into the dataset of every sequence of the step, in the order they were drawn.
        microbatch_rows: microbatch_rows[dp_rank][microbatch], the rows that each micro-batch holds.
        num_sequences, num_loss_tokens: over all ranks.
        num_tokens, num_padded_tokens: over all ranks, positions with a real token, and all computed ones.
    """

    batches: tuple[TokenBatch, ...]
    rows: tuple[int, ...]
    microbatch_rows: tuple[tuple[tuple[int, ...], ...], ...]
    num_sequences: int
    num_loss_tokens: int
    num_tokens: int
    num_padded_tokens: int


def lay_out_step(
    num_tokens: Sequence[int],
    example: Callable[[int], Example],
    *,
    batch: BatchSection,
    layout: BatchLayout,
    normalization: StepNormalization,
    pad_id: int,
    carried: Sequence[Carried],
    experts_shape: tuple[int, int] | None = None,
    shared: Sequence[SharedPrompt | None] = (),
) -> StepData:
    """Spread a step's sequences over ranks and micro-batches, and build this rank's.

    Args:
        num_tokens: of each sequence of the step; its place in this list is its row.
        example: the sequence at a place; asked for those of this rank only.
        pad_id: any valid id.
        experts_shape: as for build_token_batch.
        shared: of each sequence, with packing; none shares its prompt when empty.
    Raises:
        UserError: a sequence does not fit into batch.max_tokens.
    """
    plan = _assignment(num_tokens, batch, layout, shared)
    pieces = [
        [
            pieces_of(*_chosen(positions, num_tokens, shared), multiple=layout.sequence_multiple_of)
            for positions in microbatches
        ]
        for microbatches in plan
    ]
    totals = _batch_lengths(pieces, layout)
    batches = tuple(
        build_token_batch(
            [example(position) for position in positions],
            normalization=normalization,
            pad_id=pad_id,
            sequence_multiple_of=layout.sequence_multiple_of,
            pad_to_multiple_of=layout.pad_to_multiple_of,
            pad_to_length=total,
            carried=carried,
            experts_shape=experts_shape,
            shared=_chosen(positions, num_tokens, shared)[1],
        )
        for positions, total in zip(plan[layout.dp_rank], totals[layout.dp_rank], strict=True)
    )
    return StepData(
        batches=batches,
        rows=tuple(range(len(num_tokens))),
        microbatch_rows=tuple(tuple(map(tuple, microbatches)) for microbatches in plan),
        num_sequences=len(num_tokens),
        num_loss_tokens=normalization.num_loss_tokens,
        num_tokens=sum(
            piece.last - piece.first for of_rank in pieces for batch in of_rank for piece in batch
        ),
        num_padded_tokens=sum(map(sum, totals)),
    )


def _assignment(
    num_tokens: Sequence[int],
    batch: BatchSection,
    layout: BatchLayout,
    shared: Sequence[SharedPrompt | None],
) -> Assignment:
    multiple, max_tokens = layout.sequence_multiple_of, batch.max_tokens
    # Padding for context parallelism comes on top of what the user counted.
    max_tokens = None if max_tokens is None else predicting_length(max_tokens + 1, multiple)
    if shared:
        assert max_tokens is not None, "config.checks refuses rollout.share_prompts without packing"
        return plan_sharing_microbatches(
            num_tokens,
            shared,
            dp_size=layout.dp_size,
            max_tokens=max_tokens,
            multiple=multiple,
            microbatch_multiple=layout.microbatch_multiple,
        )
    return plan_microbatches(
        [predicting_length(length, multiple) for length in num_tokens],
        dp_size=layout.dp_size,
        micro_size=batch.micro_size,
        packing=batch.packing,
        max_tokens=max_tokens,
        microbatch_multiple=layout.microbatch_multiple,
    )


def _chosen(
    positions: Sequence[int], num_tokens: Sequence[int], shared: Sequence[SharedPrompt | None]
) -> tuple[list[int], list[SharedPrompt | None]]:
    """Tokens and shared prompts of the sequences at some places of the step."""
    return [num_tokens[i] for i in positions], [shared[i] for i in positions] if shared else []


def _batch_lengths(pieces: list[list[list[Piece]]], layout: BatchLayout) -> list[list[int]]:
    """T of every micro-batch of every rank."""
    multiple = layout.sequence_multiple_of
    totals = [
        [
            padded_batch_length(
                sum(piece.span(multiple) for piece in batch),
                sequence_multiple_of=multiple,
                pad_to_multiple_of=layout.pad_to_multiple_of,
            )
            for batch in microbatches
        ]
        for microbatches in pieces
    ]
    if not layout.uniform_length:
        return totals
    longest = max(map(max, totals))
    return [[longest] * len(microbatches) for microbatches in totals]


# Which row comes when: a pure function of the seed, so that a run resumes at the exact sample. The only
# state is the number of samples consumed; the order knows nothing about ranks or layouts.


class SampleOrder:
    """An endless sequence of row indices, a new permutation each epoch. Owns one memoised permutation."""

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool, mixture: Mixture | None = None) -> None:
        """Fix the order; without `shuffle` every epoch has that of the files. `mixture` is of these rows.

        Raises:
            UserError: there is no row, or the seed is negative.
        """
        if num_rows < 1 or seed < 0:
            raise UserError(f"sample order: expected num_rows >= 1 and seed >= 0, got {num_rows} and {seed}")
        assert mixture is None or sum(mixture.sizes) == num_rows
        self.num_rows = num_rows if mixture is None else mixture.num_rows
        self._mixture = mixture
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.zeros(0, np.int64)

    def row(self, position: int) -> int:
        """The row at `position`, samples consumed before it, of the endless sequence."""
        epoch, inside = divmod(position, self.num_rows)
        if not self._shuffle and self._mixture is None:
            return inside
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._rows_of_epoch(epoch)
        return int(self._permutation[inside])

    def _rows_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._mixture is None:
            return permutation(self.num_rows, self._seed, epoch)
        return self._mixture.epoch(epoch, seed=self._seed, shuffle=self._shuffle)

    def rows(self, start: int, count: int) -> list[int]:
        """`count` rows from position `start` on; an epoch's end is crossed without a gap."""
        return [self.row(position) for position in range(start, start + count)]


def num_training_steps(
    *,
    steps: int | None,
    epochs: int | None,
    num_rows: int,
    global_size: int,
    size_key: str = "batch.global_size",
) -> int:
    """Optimizer steps of a run; the incomplete last batch of its epochs is left out.

    Args:
        size_key: the setting that global_size, sequences per step, comes from, for the message.
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


class StepLoader:
    """Steps by number. Owns references to the dataset and its order, and nothing that changes a result."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: BatchSection,
        layout: BatchLayout,
        max_length: int,
        pad_id: int,
        seed: int,
        shuffle: bool,
        mode: Literal["train", "evaluate"] = "train",
        mixture: Mixture | None = None,
    ) -> None:
        """Bind data and layout.

        Args:
            max_length: data.max_length, the divisor of constant_length.
            pad_id: any valid id.
            mode: evaluate goes through all rows once, in the order of the files, the last step possibly
                smaller, with weights that sum to 1 over all steps.
            mixture: what training takes of each source; all rows when None.
        """
        self._dataset = dataset
        self._batch = batch
        self._layout = layout
        self._max_length = max_length
        self._pad_id = pad_id
        self._is_training = mode == "train"
        shuffle = shuffle and self._is_training
        self._order = SampleOrder(len(dataset), seed=seed, shuffle=shuffle, mixture=mixture)

    @property
    def num_evaluation_steps(self) -> int:
        """Steps that cover every row once."""
        return -(-len(self._dataset) // self._batch.global_size)

    def rows(self, step: int) -> list[int]:
        """Indices of a step's rows, in order; steps from 0, in evaluation below `num_evaluation_steps`."""
        start = step * self._batch.global_size
        count = self._batch.global_size
        if not self._is_training:
            count = min(count, len(self._dataset) - start)
            assert count > 0, "an evaluation goes through the data once"
        return self._order.rows(start, count)

    def step(self, step: int) -> StepData:
        """This rank's micro-batches of a step; a pure function of `step`, equal plans on all ranks.

        Raises:
            UserError: a sequence does not fit into batch.max_tokens.
        """
        rows = self.rows(step)
        normalization = self._normalization(rows)
        laid_out = lay_out_step(
            [int(self._dataset.lengths[row]) for row in rows],
            lambda position: self._dataset[rows[position]],
            batch=self._batch,
            layout=self._layout,
            normalization=normalization,
            pad_id=self._pad_id,
            carried=("behavior_logprobs",) if self._dataset.has_behavior_logprobs else (),
        )
        return replace(
            laid_out,
            rows=tuple(rows),
            microbatch_rows=tuple(
                tuple(tuple(rows[position] for position in positions) for positions in microbatches)
                for microbatches in laid_out.microbatch_rows
            ),
            num_loss_tokens=int(self._dataset.num_loss_tokens[rows].sum()),
        )

    def _normalization(self, rows: list[int]) -> StepNormalization:
        """Over the rows of a training step, or over all rows of an evaluation."""
        counts = self._dataset.num_loss_tokens
        over = counts[rows] if self._is_training else counts
        return StepNormalization(
            aggregation=self._batch.aggregation,
            num_loss_tokens=int(over.sum()),
            num_sequences=len(over),
            max_length=self._max_length,
        )
