"""Examples to one TokenBatch: the only place where masks move from tokens to predicting positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_sftrl.config.data import Aggregation
from megatron_sftrl.data.examples import Example
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import token_weights
from megatron_sftrl.types import OWN_CHOICE, Prefix, TokenBatch

Carried = Literal["behavior_logprobs", "old_logprobs", "rollout_logprobs", "advantages", "is_demonstration"]
"""Fields of an Example that stand under the same name in a TokenBatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNormalization:
    """What the weights of one optimizer step are made of; equal for all its batches on all ranks.

    `max_length`, in tokens, is the divisor of constant_length.
    """

    aggregation: Aggregation
    num_loss_tokens: int
    num_sequences: int
    max_length: int


def predicting_length(num_tokens: int, sequence_multiple_of: int) -> int:
    """Positions that a sequence of n >= 2 tokens occupies in a batch.

    The last token has no label, so n tokens give n - 1 positions; context parallelism cuts each sequence
    into 2 cp equal pieces, so they are padded to a multiple.
    """
    return _round_up(num_tokens - 1, sequence_multiple_of)


def padded_batch_length(num_tokens: int, *, sequence_multiple_of: int, pad_to_multiple_of: int) -> int:
    """T of a batch whose sequences take `num_tokens` positions; at least one padding sequence when 0.

    The padding behind is a sequence of its own and respects sequence_multiple_of too. T is a multiple of
    pad_to_multiple_of (sequence parallelism, train.fp8).
    """
    return _round_up(max(num_tokens, 1), math.lcm(sequence_multiple_of, pad_to_multiple_of))


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompt:
    """Sequences of a step with the same number begin with the same `length` tokens, none of them learned.

    The last token of a prompt is not among them: it predicts another one in each response.
    """

    number: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens that stand together in a batch: a sequence of its cu_seqlens.

    Args:
        example: its place among the batch's.
        first, last: the tokens that predict, from position `first` on, `last` is behind them.
        prefix: None from position 0 on.
        is_prefix: others continue it; the example itself is another piece.
    """

    example: int
    first: int
    last: int
    prefix: Prefix | None = None
    is_prefix: bool = False

    def span(self, multiple: int) -> int:
        """Positions that it occupies in a batch whose sequences are multiples of it."""
        return _round_up(self.last - self.first, multiple)


def pieces_of(
    num_tokens: Sequence[int], shared: Sequence[SharedPrompt | None] = (), *, multiple: int = 1
) -> list[Piece]:
    """How sequences of so many tokens stand in a batch: whole, or those of one prompt behind one copy of it.

    A prompt is shared where that takes fewer positions; it stands in front of the first of its sequences.
    """
    lengths = [number - 1 for number in num_tokens]
    saved: dict[int, int] = {}
    for length, prompt in zip(lengths, shared, strict=bool(shared)):
        if prompt is not None:
            whole, rest = _round_up(length, multiple), _round_up(length - prompt.length, multiple)
            copy = -_round_up(prompt.length, multiple)
            saved[prompt.number] = saved.get(prompt.number, copy) + whole - rest
    pieces: list[Piece] = []
    places: dict[int, int] = {}
    for example, length in enumerate(lengths):
        prompt = shared[example] if shared else None
        if prompt is None or saved[prompt.number] <= 0:
            pieces.append(Piece(example=example, first=0, last=length))
            continue
        if prompt.number not in places:
            places[prompt.number] = len(pieces)
            pieces.append(Piece(example=example, first=0, last=prompt.length, is_prefix=True))
        prefix = Prefix(places[prompt.number], prompt.length)
        pieces.append(Piece(example=example, first=prompt.length, last=length, prefix=prefix))
    return pieces


def build_token_batch(
    examples: Sequence[Example],
    *,
    normalization: StepNormalization,
    pad_id: int,
    sequence_multiple_of: int = 1,
    pad_to_multiple_of: int = 1,
    pad_to_length: int | None = None,
    carried: Sequence[Carried] = (),
    experts_shape: tuple[int, int] | None = None,
    shared: Sequence[SharedPrompt | None] = (),
) -> TokenBatch:
    """Lay sequences one behind the other, aligned on the predicting position: labels[t] = tokens[t + 1].

    Each sequence is padded inside its own cu_seqlens span. What is missing to the batch's length is one
    more sequence of padding. Padding has weight 0, positions that go on counting, and finite values. The
    batch is on the CPU.

    Args:
        examples: in order; none gives a batch of padding alone.
        normalization: of the whole step, which token_weight is filled from.
        pad_id: any valid id.
        sequence_multiple_of, pad_to_multiple_of: each sequence's length, and T, is a multiple of it.
        pad_to_length: T, when all micro-batches of a step have to be equal.
        carried: values of learned tokens that the batch carries, too; 0 where masked.
        experts_shape: (layers with experts, k) where the batch carries experts; OWN_CHOICE where an example
            has none, and in padding.
        shared: of each example; none shares its prompt when empty.
    Raises:
        UserError: the examples do not fit into pad_to_length, or an example lacks a carried value.
    """
    pieces = pieces_of([len(example.tokens) for example in examples], shared, multiple=sequence_multiple_of)
    lengths = [piece.span(sequence_multiple_of) for piece in pieces]
    total = padded_batch_length(
        sum(lengths), sequence_multiple_of=sequence_multiple_of, pad_to_multiple_of=pad_to_multiple_of
    )
    if pad_to_length is not None:
        if pad_to_length < total or pad_to_length % math.lcm(sequence_multiple_of, pad_to_multiple_of):
            raise UserError(
                f"pad_to_length: expected at least {total} and a multiple of "
                f"{math.lcm(sequence_multiple_of, pad_to_multiple_of)}, got {pad_to_length}"
            )
        total = pad_to_length
    spans = [*lengths, total - sum(lengths)] if total > sum(lengths) else lengths
    fields = _filled(examples, pieces, lengths, total, pad_id, carried, experts_shape)
    loss_mask, cu_seqlens = fields["loss_mask"], _cumulative(spans)
    return TokenBatch(
        cu_seqlens=cu_seqlens,
        token_weight=token_weights(
            loss_mask,
            cu_seqlens,
            normalization.aggregation,
            num_loss_tokens=normalization.num_loss_tokens,
            num_sequences=normalization.num_sequences,
            max_length=normalization.max_length,
        ),
        prefixes=_prefixes(pieces, len(spans)),
        **fields,
    )


def _filled(
    examples: Sequence[Example],
    pieces: Sequence[Piece],
    lengths: Sequence[int],
    total: int,
    pad_id: int,
    carried: Sequence[Carried],
    experts_shape: tuple[int, int] | None,
) -> dict[str, Any]:
    """[total, ...] fields of a TokenBatch of pieces that take `lengths` positions each."""
    tokens, labels = (np.full(total, pad_id, np.int64) for _ in range(2))
    positions, mask, is_padding = (
        np.empty(total, np.int64),
        np.zeros(total, np.bool_),
        np.ones(total, np.bool_),
    )
    values = {
        name: np.zeros(total, np.bool_ if name == "is_demonstration" else np.float32) for name in carried
    }
    experts = np.full((total, *experts_shape), OWN_CHOICE, np.int16) if experts_shape else None
    start = 0
    for piece, length in zip(pieces, lengths, strict=True):
        example, first, last = examples[piece.example], piece.first, piece.last
        assert not example.loss_mask[: first + 1].any(), "nothing is learned of what stands in front"
        real = slice(start, start + last - first)
        tokens[real] = example.tokens[first:last]
        labels[real] = example.tokens[first + 1 : last + 1]
        mask[real] = is_learned = example.loss_mask[first + 1 : last + 1]
        is_padding[real] = False
        positions[start : start + length] = np.arange(first, first + length)
        for name, target in values.items():
            found = getattr(example, name)
            if found is None:
                raise UserError(f"{example.source}: the row has no {name}")
            if not piece.is_prefix:
                target[real][is_learned] = found
        if experts is not None and example.experts is not None:
            experts[real] = example.experts[first:last]
        start += length
    positions[start:] = np.arange(total - start)
    arrays = {
        "tokens": tokens, "labels": labels, "positions": positions, "loss_mask": mask,
        "is_padding": is_padding, **({} if experts is None else {"experts": experts}), **values,
    }  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _prefixes(pieces: Sequence[Piece], num_sequences: int) -> tuple[Prefix | None, ...]:
    """As in TokenBatch."""
    if all(piece.prefix is None for piece in pieces):
        return ()
    return (*(piece.prefix for piece in pieces), *[None] * (num_sequences - len(pieces)))


def padded_batch(batch: TokenBatch, total: int) -> TokenBatch:
    """The batch with one more sequence of padding, up to T = `total`; itself where it has as many tokens.

    Args:
        total: a multiple of whatever T is a multiple of.
    """
    missing = total - batch.num_tokens
    if not missing:
        return batch
    assert missing > 0 and batch.is_padding is not None
    experts = {}
    if batch.experts is not None:
        chosen = batch.experts.new_full((missing, *batch.experts.shape[1:]), OWN_CHOICE)
        experts["experts"] = torch.cat([batch.experts, chosen])
    return batch.map(
        lambda value: torch.cat([value, value.new_zeros(missing)]),
        **experts,
        positions=torch.cat([batch.positions, torch.arange(missing)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([total])]),
        is_padding=torch.cat([batch.is_padding, batch.is_padding.new_ones(missing)]),
        prefixes=(*batch.prefixes, None) if batch.prefixes else (),
    )


def _cumulative(lengths: Sequence[int]) -> Tensor:
    """[S + 1] int32, first 0."""
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# Which sequence goes into which micro-batch of which data-parallel rank: a pure function of the lengths.
# Every rank computes the whole plan and takes its part, so nothing is communicated and all ranks run the
# same number of micro-batches: a rank with fewer would leave the others waiting in a collective for ever.

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
    """Split one optimizer step: each position of `lengths` exactly once.

    Without packing a micro-batch holds `micro_size` sequences of similar length. With packing, sequences
    are put into as few micro-batches of at most `max_tokens` as first-fit-decreasing finds, then spread
    evenly over as many as all ranks need. Every rank has the same number of micro-batches, at least one;
    those that got no sequence are empty.

    Args:
        lengths: tokens of each sequence of the step, its own padding included.
        microbatch_multiple: divides each rank's number of micro-batches (pp under virtual pipelining).
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


def plan_sharing_microbatches(
    num_tokens: Sequence[int],
    shared: Sequence[SharedPrompt | None],
    *,
    dp_size: int,
    max_tokens: int,
    multiple: int,
    microbatch_multiple: int = 1,
) -> Assignment:
    """The same with packing, where sequences with a shared prompt are kept together.

    Such a group is cut where it does not fit into a micro-batch, and further while that makes the rank with
    the most positions have fewer: each part computes the prompt again.

    Args:
        num_tokens: of each sequence of the step.
        multiple: of the positions of each sequence (2 * cp when cp > 1).
    Raises:
        UserError: as plan_microbatches.
    """

    def occupied(positions: Sequence[int]) -> int:
        pieces = pieces_of(
            [num_tokens[i] for i in positions], [shared[i] for i in positions], multiple=multiple
        )
        return sum(piece.span(multiple) for piece in pieces)

    best: Assignment | None = None
    least, cuts = math.inf, 1
    while True:
        parts = _parts_of_groups(num_tokens, shared, cuts, occupied, capacity=max_tokens)
        plan = plan_microbatches(
            [occupied(part) for part in parts],
            dp_size=dp_size,
            micro_size=1,
            packing=True,
            max_tokens=max_tokens,
            microbatch_multiple=microbatch_multiple,
        )
        whole = [[sorted(i for part in batch for i in parts[part]) for batch in of_rank] for of_rank in plan]
        most = max(sum(map(occupied, of_rank)) for of_rank in whole)
        if most >= least:
            assert best is not None
            return best
        best, least, cuts = whole, most, 2 * cuts


def _parts_of_groups(
    num_tokens: Sequence[int],
    shared: Sequence[SharedPrompt | None],
    cuts: int,
    occupied: Callable[[Sequence[int]], int],
    *,
    capacity: int,
) -> list[list[int]]:
    """Positions of the step, those of a group in at least `cuts` parts of at most `capacity` tokens."""
    rest = [
        length - (0 if prompt is None else prompt.length)
        for length, prompt in zip(num_tokens, shared, strict=True)
    ]
    groups: dict[int, list[int]] = {}
    for position, prompt in enumerate(shared):
        groups.setdefault(-1 - position if prompt is None else prompt.number, []).append(position)
    parts: list[list[int]] = []
    for members in groups.values():
        longest_first = sorted(members, key=lambda position: (-rest[position], position))
        for number in range(min(cuts, len(members)), len(members) + 1):
            cut = _least_loaded(rest, longest_first, sum(rest), number)
            assert cut is not None, "there is room for all of them together"
            if max(map(occupied, cut)) <= capacity:
                break
        parts += cut
    return parts


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
