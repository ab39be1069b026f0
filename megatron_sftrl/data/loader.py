"""The micro-batches of one optimizer step, for one data-parallel rank.

All rows are tokenized before the first step, so that building a step costs about a millisecond; it reads
nothing but memory-mapped arrays, and the same step gives the same batches however often it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sftrl.config.schema import BatchSection
from megatron_sftrl.data.dataset import Dataset
from megatron_sftrl.data.order import SampleOrder
from megatron_sftrl.data.packing import (
    StepNormalization,
    build_token_batch,
    padded_batch_length,
    predicting_length,
)
from megatron_sftrl.data.plan import Assignment, plan_microbatches
from megatron_sftrl.types import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """What the layout of the ranks asks of a batch.

    Args:
        dp_rank: this rank's place among dp_size.
        dp_size: data-parallel ranks.
        sequence_multiple_of: each sequence is padded to a multiple of it (2 * cp when cp > 1).
        pad_to_multiple_of: T is a multiple of it (tp * cp under sequence parallelism).
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
        num_sequences: over all ranks.
        num_loss_tokens: learned tokens over all ranks.
        num_tokens: positions with a real token, over all ranks.
        num_padded_tokens: positions computed over all ranks, padding included.
    """

    batches: tuple[TokenBatch, ...]
    rows: tuple[int, ...]
    microbatch_rows: tuple[tuple[tuple[int, ...], ...], ...]
    num_sequences: int
    num_loss_tokens: int
    num_tokens: int
    num_padded_tokens: int


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
    ) -> None:
        """Bind data and layout.

        Args:
            dataset: tokenized rows.
            batch: sizes, packing and aggregation.
            layout: of the ranks.
            max_length: data.max_length, the divisor of constant_length.
            pad_id: any valid id.
            seed: of the order.
            shuffle: a new order each epoch.
            mode: evaluate goes through all rows once, in the order of the files, the last step possibly
                smaller, with weights that sum to 1 over all steps.
        """
        self._dataset = dataset
        self._batch = batch
        self._layout = layout
        self._max_length = max_length
        self._pad_id = pad_id
        self._is_training = mode == "train"
        self._order = SampleOrder(len(dataset), seed=seed, shuffle=shuffle and self._is_training)

    @property
    def num_evaluation_steps(self) -> int:
        """Steps that cover every row once."""
        return -(-len(self._dataset) // self._batch.global_size)

    def rows(self, step: int) -> list[int]:
        """Rows of a step.

        Args:
            step: from 0; in evaluation below `num_evaluation_steps`.
        Returns:
            Indices into the dataset, in order.
        """
        start = step * self._batch.global_size
        count = self._batch.global_size
        if not self._is_training:
            count = min(count, len(self._dataset) - start)
            assert count > 0, "an evaluation goes through the data once"
        return self._order.rows(start, count)

    def step(self, step: int) -> StepData:
        """Micro-batches of a step; a pure function of `step`, equal plans on all ranks.

        Args:
            step: as in `rows`; a resumed run asks for the step it had not finished.
        Returns:
            This rank's batches.
        Raises:
            ValueError: a sequence does not fit into batch.max_tokens.
        """
        rows, layout = self.rows(step), self._layout
        multiple = layout.sequence_multiple_of
        num_tokens = [int(self._dataset.lengths[row]) for row in rows]
        lengths = [predicting_length(length, multiple) for length in num_tokens]
        max_tokens = self._batch.max_tokens
        plan = plan_microbatches(
            lengths,
            dp_size=layout.dp_size,
            micro_size=self._batch.micro_size,
            packing=self._batch.packing,
            # Padding for context parallelism comes on top of what the user counted.
            max_tokens=None if max_tokens is None else predicting_length(max_tokens + 1, multiple),
            microbatch_multiple=layout.microbatch_multiple,
        )
        totals = self._batch_lengths(plan, lengths)
        normalization = self._normalization(rows)
        batches = tuple(
            build_token_batch(
                [self._dataset[rows[position]] for position in positions],
                normalization=normalization,
                pad_id=self._pad_id,
                sequence_multiple_of=multiple,
                pad_to_multiple_of=layout.pad_to_multiple_of,
                pad_to_length=total,
                has_behavior_logprobs=self._dataset.has_behavior_logprobs,
            )
            for positions, total in zip(plan[layout.dp_rank], totals[layout.dp_rank], strict=True)
        )
        return StepData(
            batches=batches,
            rows=tuple(rows),
            microbatch_rows=tuple(
                tuple(tuple(rows[position] for position in positions) for positions in microbatches)
                for microbatches in plan
            ),
            num_sequences=len(rows),
            num_loss_tokens=int(self._dataset.num_loss_tokens[rows].sum()),
            num_tokens=sum(num_tokens) - len(rows),
            num_padded_tokens=sum(map(sum, totals)),
        )

    def _batch_lengths(self, plan: Assignment, lengths: list[int]) -> list[list[int]]:
        """T of every micro-batch of every rank."""
        totals = [
            [
                padded_batch_length(
                    sum(lengths[position] for position in positions),
                    sequence_multiple_of=self._layout.sequence_multiple_of,
                    pad_to_multiple_of=self._layout.pad_to_multiple_of,
                )
                for positions in microbatches
            ]
            for microbatches in plan
        ]
        if not self._layout.uniform_length:
            return totals
        longest = max(map(max, totals))
        return [[longest] * len(microbatches) for microbatches in totals]

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
