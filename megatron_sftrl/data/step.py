"""One optimizer step laid out over ranks and micro-batches: the same for demonstrations and for rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sftrl.config.schema import BatchSection
from megatron_sftrl.data.example import Example
from megatron_sftrl.data.packing import (
    Carried,
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


def lay_out_step(
    num_tokens: Sequence[int],
    example: Callable[[int], Example],
    *,
    batch: BatchSection,
    layout: BatchLayout,
    normalization: StepNormalization,
    pad_id: int,
    carried: Sequence[Carried],
) -> StepData:
    """Spread a step's sequences over ranks and micro-batches, and build this rank's.

    Args:
        num_tokens: of each sequence of the step; its place in this list is its row.
        example: the sequence at a place; asked for those of this rank only.
        batch: sizes and packing.
        layout: of the ranks.
        normalization: of the step.
        pad_id: any valid id.
        carried: as build_token_batch.
    Raises:
        UserError: a sequence does not fit into batch.max_tokens.
    """
    multiple = layout.sequence_multiple_of
    lengths = [predicting_length(length, multiple) for length in num_tokens]
    max_tokens = batch.max_tokens
    plan = plan_microbatches(
        lengths,
        dp_size=layout.dp_size,
        micro_size=batch.micro_size,
        packing=batch.packing,
        # Padding for context parallelism comes on top of what the user counted.
        max_tokens=None if max_tokens is None else predicting_length(max_tokens + 1, multiple),
        microbatch_multiple=layout.microbatch_multiple,
    )
    totals = _batch_lengths(plan, lengths, layout)
    batches = tuple(
        build_token_batch(
            [example(position) for position in positions],
            normalization=normalization,
            pad_id=pad_id,
            sequence_multiple_of=multiple,
            pad_to_multiple_of=layout.pad_to_multiple_of,
            pad_to_length=total,
            carried=carried,
        )
        for positions, total in zip(plan[layout.dp_rank], totals[layout.dp_rank], strict=True)
    )
    return StepData(
        batches=batches,
        rows=tuple(range(len(num_tokens))),
        microbatch_rows=tuple(tuple(map(tuple, microbatches)) for microbatches in plan),
        num_sequences=len(num_tokens),
        num_loss_tokens=normalization.num_loss_tokens,
        num_tokens=sum(num_tokens) - len(num_tokens),
        num_padded_tokens=sum(map(sum, totals)),
    )


def _batch_lengths(plan: Assignment, lengths: list[int], layout: BatchLayout) -> list[list[int]]:
    """T of every micro-batch of every rank."""
    totals = [
        [
            padded_batch_length(
                sum(lengths[position] for position in positions),
                sequence_multiple_of=layout.sequence_multiple_of,
                pad_to_multiple_of=layout.pad_to_multiple_of,
            )
            for positions in microbatches
        ]
        for microbatches in plan
    ]
    if not layout.uniform_length:
        return totals
    longest = max(map(max, totals))
    return [[longest] * len(microbatches) for microbatches in totals]
