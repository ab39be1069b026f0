"""Which sequence goes into which micro-batch of which data-parallel rank: a pure function of the lengths.

Every rank computes the whole plan and takes its part, so nothing is communicated and all ranks run the
same number of micro-batches: a rank with fewer would leave the others waiting in a collective for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sftrl.errors import UserError

Assignment = list[list[list[int]]]
"""assignment[dp_rank][microbatch] = positions in the step, possibly none."""


def plan_microbatches(
    lengths: Sequence[int],
    *,
    dp_size: int,
    micro_size: int,
    packing: bool,
    max_tokens: int | None,
    microbatch_multiple: int = 1,
) -> Assignment:
    """Split one optimizer step.

    Without packing a micro-batch holds `micro_size` sequences of similar length. With packing, sequences
    are put into as few micro-batches of at most `max_tokens` as first-fit-decreasing finds, then spread
    evenly over as many as all ranks need.

    Args:
        lengths: tokens of each sequence of the step, its own padding included.
        dp_size: data-parallel ranks.
        micro_size: sequences per micro-batch, without packing.
        packing: fill by tokens instead.
        max_tokens: tokens per micro-batch, with packing.
        microbatch_multiple: the number of micro-batches of a rank is a multiple of it (the pipeline size,
            under virtual pipeline parallelism).
    Returns:
        Each position of `lengths` exactly once; every rank has the same number of micro-batches, at least
        one, and those that got no sequence are empty.
    Raises:
        UserError: a sequence is longer than max_tokens, or packing without max_tokens.
    """
    assert dp_size >= 1 and micro_size >= 1 and microbatch_multiple >= 1
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    wave = dp_size * microbatch_multiple
    if packing:
        if max_tokens is None:
            raise UserError("batch.packing needs batch.max_tokens")
        groups = _pack(lengths, longest_first, capacity=max_tokens, multiple=wave)
    else:
        groups = [longest_first[i : i + micro_size] for i in range(0, len(lengths), micro_size)]
    groups += [[] for _ in range(-len(groups) % wave or (0 if groups else wave))]
    groups.sort(key=lambda group: (-sum(lengths[i] for i in group), min(group, default=len(lengths))))
    assignment: Assignment = [[] for _ in range(dp_size)]
    for start in range(0, len(groups), dp_size):
        # Back and forth, so that no rank gets the longest group of every round.
        ranks = range(dp_size) if (start // dp_size) % 2 == 0 else reversed(range(dp_size))
        for rank, group in zip(ranks, groups[start : start + dp_size], strict=True):
            assignment[rank].append(sorted(group))
    return assignment


def _pack(
    lengths: Sequence[int], longest_first: Sequence[int], *, capacity: int, multiple: int
) -> list[list[int]]:
    """Groups of at most `capacity` tokens, as few as first-fit-decreasing finds, evenly filled."""
    for position in longest_first[:1]:
        if lengths[position] > capacity:
            raise UserError(
                f"batch.max_tokens = {capacity} is smaller than a sequence of {lengths[position]} tokens; "
                "raise batch.max_tokens to at least data.max_length"
            )
    fitted = _first_fit(lengths, longest_first, capacity)
    num_groups = len(fitted) + -len(fitted) % multiple
    balanced = _least_loaded(lengths, longest_first, capacity, num_groups)
    return fitted if balanced is None else balanced


def _first_fit(lengths: Sequence[int], longest_first: Sequence[int], capacity: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[int] = []
    for position in longest_first:
        length = lengths[position]
        index = next((i for i, free in enumerate(room) if free >= length), None)
        if index is None:
            groups.append([])
            room.append(capacity)
            index = len(groups) - 1
        groups[index].append(position)
        room[index] -= length
    return groups


def _least_loaded(
    lengths: Sequence[int], longest_first: Sequence[int], capacity: int, num_groups: int
) -> list[list[int]] | None:
    """Longest first, each into the emptiest group; None when that overflows a group first-fit could avoid."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [0] * num_groups
    for position in longest_first:
        index = min(range(num_groups), key=loads.__getitem__)
        if loads[index] + lengths[position] > capacity:
            return None
        groups[index].append(position)
        loads[index] += lengths[position]
    return groups
