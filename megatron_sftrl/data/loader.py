"""The micro-batches of one optimizer step, for one data-parallel rank.

All rows are tokenized before the first step, so that building a step costs about a millisecond; it reads
nothing but memory-mapped arrays, and the same step gives the same batches however often it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megatron_sftrl.config.schema import BatchSection
from megatron_sftrl.data.dataset import Dataset
from megatron_sftrl.data.order import SampleOrder
from megatron_sftrl.data.packing import StepNormalization
from megatron_sftrl.data.step import BatchLayout, StepData, lay_out_step


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
