"""Examples to a TokenBatch: alignment, padding, weights, scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_sftrl.data.examples import Example
from megatron_sftrl.data.packing import SharedPrompt, StepNormalization, build_token_batch, padded_batch
from megatron_sftrl.types import OWN_CHOICE, Prefix

PAD = 99
STEP = StepNormalization(aggregation="token_mean", num_loss_tokens=5, num_sequences=2, max_length=8)


def example(tokens: list[int], mask: str, *, scores: list[float] | None = None) -> Example:
    return Example(
        tokens=np.array(tokens, np.int32),
        loss_mask=np.array([c == "1" for c in mask]),
        behavior_logprobs=None if scores is None else np.array(scores, np.float32),
        row=0,
        source="t.jsonl:1",
    )


FIRST = example([10, 11, 12, 13], "0011", scores=[-1.0, -2.0])
SECOND = example([20, 21, 22, 23, 24, 25], "011001", scores=[-3.0, -4.0, -5.0])


def test_labels_follow_tokens_and_no_label_crosses_into_the_next_sequence() -> None:
    batch = build_token_batch([FIRST, SECOND], normalization=STEP, pad_id=PAD, carried=("behavior_logprobs",))
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, 22, 23, 24]
    assert batch.labels.tolist() == [11, 12, 13, 21, 22, 23, 24, 25]
    assert batch.loss_mask.int().tolist() == [0, 1, 1, 1, 1, 0, 0, 1]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 8]
    assert batch.behavior_logprobs is not None
    assert batch.behavior_logprobs.tolist() == [0, -1, -2, -3, -4, 0, 0, -5]
    assert batch.token_weight.tolist() == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0, 0, 0.2])
    dtypes = (batch.tokens.dtype, batch.loss_mask.dtype, batch.cu_seqlens.dtype, batch.token_weight.dtype)
    assert dtypes == (torch.int64, torch.bool, torch.int32, torch.float32)


def test_each_sequence_is_padded_in_its_own_span_and_the_rest_is_a_sequence_of_padding() -> None:
    batch = build_token_batch(
        [FIRST, SECOND],
        normalization=STEP,
        pad_id=PAD,
        sequence_multiple_of=4,
        pad_to_multiple_of=8,
        carried=("behavior_logprobs",),
    )
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 16]
    assert batch.positions.tolist() == [*range(4), *range(8), *range(4)]
    real = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    assert batch.is_padding is not None
    assert torch.equal(batch.is_padding, ~real)
    plain = build_token_batch([FIRST, SECOND], normalization=STEP, pad_id=PAD, carried=("behavior_logprobs",))
    for name in ("tokens", "labels", "loss_mask", "token_weight", "behavior_logprobs"):
        padded = getattr(batch, name)
        assert torch.equal(padded[real], getattr(plain, name)), name
        assert set(padded[~real].tolist()) == {PAD if name in ("tokens", "labels") else 0}, name


def test_sequence_mean_counts_loss_tokens_of_the_sequence_and_not_its_padding() -> None:
    step = StepNormalization(aggregation="sequence_mean", num_loss_tokens=5, num_sequences=2, max_length=8)
    batch = build_token_batch([FIRST, SECOND], normalization=step, pad_id=PAD, sequence_multiple_of=4)
    weights = batch.token_weight[batch.loss_mask].tolist()
    assert weights == pytest.approx([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6])


def test_no_example_gives_a_batch_of_padding_that_weighs_nothing() -> None:
    batch = build_token_batch([], normalization=STEP, pad_id=PAD, sequence_multiple_of=4)
    assert batch.num_tokens == 4
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.token_weight.sum() == 0
    assert not batch.loss_mask.any()
    fixed = build_token_batch([], normalization=STEP, pad_id=PAD, pad_to_length=12)
    assert fixed.cu_seqlens.tolist() == [0, 12]


def test_a_length_that_does_not_fit_is_refused() -> None:
    for length in (7, 10):
        with pytest.raises(ValueError, match="at least 8 and a multiple of 4"):
            build_token_batch(
                [FIRST, SECOND], normalization=STEP, pad_id=PAD, pad_to_multiple_of=4, pad_to_length=length
            )
    with pytest.raises(ValueError, match=r"t\.jsonl:1: the row has no behavior_logprobs"):
        build_token_batch(
            [example([1, 2], "01")], normalization=STEP, pad_id=PAD, carried=("behavior_logprobs",)
        )


def test_building_a_batch_leaves_the_examples_alone() -> None:
    before = SECOND.tokens.copy(), SECOND.loss_mask.copy()
    batch = build_token_batch([SECOND], normalization=STEP, pad_id=PAD)
    batch.tokens.fill_(0)
    np.testing.assert_array_equal(SECOND.tokens, before[0])
    np.testing.assert_array_equal(SECOND.loss_mask, before[1])


def test_responses_stand_behind_one_copy_of_their_prompt_which_ends_before_its_last_token() -> None:
    group = [
        example([10, 11, 12, 30], "0001", scores=[-1.0]),
        SECOND,
        example([10, 11, 12, 40, 41], "00011", scores=[-2.0, -3.0]),
    ]
    prompt = SharedPrompt(number=7, length=2)
    batch = build_token_batch(
        group,
        normalization=STEP,
        pad_id=PAD,
        pad_to_multiple_of=8,
        carried=("behavior_logprobs",),
        shared=[prompt, None, prompt],
    )
    #                               prompt    first  second              third   padding
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, 22, 23, 24, 12, 40, *[PAD] * 6]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, *range(6)]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 8, 10, 16]
    assert batch.prefixes == (None, Prefix(0, 2), None, Prefix(0, 2), None)
    assert batch.complete() == [1, 2, 3, 4], "all but the prompt, and the padding"
    labels = batch.labels[batch.loss_mask]
    assert labels.tolist() == [30, 21, 22, 25, 40, 41]
    assert batch.behavior_logprobs is not None
    assert batch.behavior_logprobs[batch.loss_mask].tolist() == [-1, -3, -4, -5, -2, -3]
    longer = padded_batch(batch, 24)
    assert longer.prefixes == (*batch.prefixes, None)


def test_a_prompt_is_copied_where_one_for_all_takes_more_room() -> None:
    """Of context parallelism each piece is a multiple of 4: prompt 4 + 4 + 4, and 4 + 4 without sharing."""
    group = [example([10, 11, 12, number], "0001") for number in (30, 31)]
    shared = [SharedPrompt(number=0, length=2)] * 2
    batch = build_token_batch(group, normalization=STEP, pad_id=PAD, sequence_multiple_of=4, shared=shared)
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.prefixes == ()
    alone = build_token_batch(group[:1], normalization=STEP, pad_id=PAD, shared=shared[:1])
    assert alone.tokens.tolist() == [10, 11, 12]


def test_a_shared_prompt_visits_the_experts_of_its_first_response() -> None:
    group = [example([10, 11, 12, 30], "0001"), example([10, 11, 12, 40, 41], "00011")]
    experts = [np.arange(len(each.tokens) - 1)[:, None, None] + 10 * i for i, each in enumerate(group)]
    batch = build_token_batch(
        [replace(each, experts=chosen) for each, chosen in zip(group, experts, strict=True)],
        normalization=STEP,
        pad_id=PAD,
        pad_to_multiple_of=4,
        experts_shape=(1, 1),
        shared=[SharedPrompt(number=0, length=2)] * 2,
    )
    assert batch.experts is not None
    assert batch.experts.flatten().tolist() == [0, 1, 2, 12, 13, *[OWN_CHOICE] * 3]
