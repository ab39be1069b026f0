"""From responses to batches: the very tokens that were generated, each with its own numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_sftrl.config.schema import BatchSection
from megatron_sftrl.data.loader import BatchLayout
from megatron_sftrl.data.packing import padded_batch
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.rl.advantages import AdvantageEstimator
from megatron_sftrl.rl.rewards import Scored
from megatron_sftrl.trainers.experience import ExperienceBatches, Response, as_example, with_advantages
from megatron_sftrl.types import OWN_CHOICE, Rollout, TokenBatch

END = 2


def response(prompt: tuple[int, ...], generated: tuple[int, ...], *, advantage: float = 1.0) -> Response:
    """Log-probabilities that tell every token of every response apart."""
    count = len(generated)
    return Response(
        group=0,
        row=PromptRow(tokens=prompt, values={}, source="rows.jsonl:1"),
        rollout=Rollout(
            prompt_tokens=prompt,
            response_tokens=generated,
            logprobs=tuple(-token - 0.25 for token in generated),
            is_finished=generated[-1] == END,
        ),
        scored=Scored(reward=0.0, lenient=0.0, parts=()),
        advantage=advantage,
        old_logprobs=tuple(-token - 0.5 for token in generated)[:count],
    )


FINISHED = response((11, 12, 13), (21, 22, END), advantage=0.5)
ONE_TOKEN = response((14,), (END,), advantage=-2.0)
CUT_OFF = response((15, 16), (23, 24, 25, 26), advantage=1.5)


def batches(mask_truncated: bool = False, **changes: object) -> ExperienceBatches:
    section = BatchSection.model_validate({"global_size": 3, "micro_size": 3, **changes})
    return ExperienceBatches(
        batch=section, layout=BatchLayout(), max_length=20, pad_id=0, mask_truncated=mask_truncated
    )


def learned(batch: TokenBatch) -> list[tuple[int, int, float, float, float]]:
    """Of each position with loss: token, label, advantage, old and rollout log-probability."""
    assert batch.advantages is not None
    assert batch.old_logprobs is not None
    assert batch.rollout_logprobs is not None
    columns = (batch.tokens, batch.labels, batch.advantages, batch.old_logprobs, batch.rollout_logprobs)
    return list(zip(*(column[batch.loss_mask].tolist() for column in columns), strict=True))


def test_every_generated_token_is_trained_with_its_own_numbers_the_end_token_too() -> None:
    data = batches().lay_out([FINISHED, ONE_TOKEN, CUT_OFF])
    assert data is not None
    (batch,) = data.batches
    expected = []
    for each in (FINISHED, ONE_TOKEN, CUT_OFF):
        whole = [*each.rollout.prompt_tokens, *each.rollout.response_tokens]
        start = len(each.rollout.prompt_tokens)
        expected += [
            (whole[i - 1], whole[i], each.advantage, -whole[i] - 0.5, -whole[i] - 0.25)
            for i in range(start, len(whole))
        ]
    # All of these numbers are exact in fp32.
    assert sorted(learned(batch)) == sorted(expected)
    assert data.num_loss_tokens == 3 + 1 + 4


def test_token_ids_are_taken_as_they_were_generated() -> None:
    for each in (FINISHED, ONE_TOKEN, CUT_OFF):
        example = as_example(each, 5, is_learned=True)
        assert example.tokens.tolist() == [*each.rollout.prompt_tokens, *each.rollout.response_tokens]
        assert example.loss_mask.tolist() == [False] * len(each.rollout.prompt_tokens) + [True] * len(
            each.rollout.response_tokens
        )


def test_a_masked_response_has_no_loss_and_no_share_of_the_step() -> None:
    data = batches(mask_truncated=True).lay_out([FINISHED, ONE_TOKEN, CUT_OFF])
    assert data is not None
    (batch,) = data.batches
    assert sorted(label for _, label, *_ in learned(batch)) == [END, END, 21, 22]
    # Mean over the four tokens that are left.
    assert batch.token_weight[batch.loss_mask].tolist() == pytest.approx([0.25] * 4)
    assert float(batch.token_weight.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("aggregation", "finished", "short"),
    [("sequence_mean", 1 / 6, 1 / 2), ("constant_length", 1 / 40, 1 / 40)],
)
def test_means_over_sequences_are_over_those_that_carry_loss(
    aggregation: str, finished: float, short: float
) -> None:
    data = batches(mask_truncated=True, aggregation=aggregation).lay_out([FINISHED, ONE_TOKEN, CUT_OFF])
    assert data is not None
    (batch,) = data.batches
    weights = batch.token_weight[batch.loss_mask].tolist()
    assert sorted(weights) == pytest.approx(sorted([finished] * 3 + [short]))


def test_an_advantage_that_carries_no_loss_is_no_signal() -> None:
    even = replace(FINISHED, advantage=0.0)
    assert not batches(mask_truncated=True).has_signal([CUT_OFF, even])
    assert batches(mask_truncated=False).has_signal([CUT_OFF, even])
    assert batches(mask_truncated=True).has_signal([even, ONE_TOKEN])


def test_a_step_in_which_nothing_is_learned_is_no_step() -> None:
    assert batches(mask_truncated=True).lay_out([CUT_OFF, CUT_OFF]) is None
    assert batches(mask_truncated=False).lay_out([CUT_OFF, CUT_OFF]) is not None


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token_mean", {3: 1 / 8, 1: 1 / 8, 4: 1 / 8}),
        ("sequence_mean", {3: 1 / 9, 1: 1 / 3, 4: 1 / 12}),
        # Dr. GRPO: the same constant whatever the lengths; 3 sequences of at most 20 tokens.
        ("constant_length", {3: 1 / 60, 1: 1 / 60, 4: 1 / 60}),
    ],
)
def test_each_aggregation_weighs_tokens_by_its_own_rule(aggregation: str, weights: dict[int, float]) -> None:
    data = batches(aggregation=aggregation, micro_size=1).lay_out([FINISHED, ONE_TOKEN, CUT_OFF])
    assert data is not None
    for batch in data.batches:
        found = batch.token_weight[batch.loss_mask]
        assert found.tolist() == pytest.approx([weights[len(found)]] * len(found))


@pytest.mark.parametrize("changes", [{"micro_size": 1}, {"packing": True, "max_tokens": 20}])
def test_micro_batches_and_packing_change_no_number(changes: dict) -> None:
    changes = {"micro_size": 1, **changes} if "packing" not in changes else changes
    section = {"global_size": 3, **changes}
    layout = replace(batches(), batch=BatchSection.model_validate(section))
    data, truth = (
        layout.lay_out([FINISHED, ONE_TOKEN, CUT_OFF]),
        batches().lay_out([FINISHED, ONE_TOKEN, CUT_OFF]),
    )
    assert data is not None
    assert truth is not None
    assert sorted(row for batch in data.batches for row in learned(batch)) == sorted(
        learned(truth.batches[0])
    )
    total = torch.cat([batch.token_weight for batch in data.batches]).sum()
    assert float(total) == pytest.approx(1.0)


def graded(group: int, reward: float | None) -> Response:
    """A response with that reward; None: its verifier failed."""
    return replace(FINISHED, group=group, scored=Scored(reward=reward, lenient=reward, parts=()))


# Two groups that arrived mixed: [1, ?, 0, 1] and [?, 1], and one of which nothing is known.
MIXED = [
    graded(group, reward)
    for group, reward in [(7, 1), (9, None), (7, None), (7, 0), (9, 1), (7, 1), (3, None)]
]


@pytest.mark.parametrize(
    ("estimator", "right", "wrong"),
    [
        # Of [1, 0, 1] alone: mean 2/3, std sqrt(1/3) with n - 1. As zeros the two failures would give 1/2.
        ("group_normalized", (1 / 3) / (math.sqrt(1 / 3) + 1e-6), (-2 / 3) / (math.sqrt(1 / 3) + 1e-6)),
        ("dr_grpo", 1 / 3, -2 / 3),
        # The other two of three have the mean 1/2 and 1.
        ("leave_one_out", 1 / 2, -1.0),
    ],
)
def test_a_response_without_a_reward_is_no_part_of_its_groups_mean(
    estimator: AdvantageEstimator, right: float, wrong: float
) -> None:
    found = [each.advantage for each in with_advantages(MIXED, estimator)]
    # Group 9 has one reward left, which has nothing to be compared with.
    assert found == pytest.approx([right, 0.0, 0.0, wrong, 0.0, right, 0.0], rel=1e-12)
    assert FINISHED.advantage == 0.5


def test_nothing_known_is_no_signal_and_no_error() -> None:
    done = with_advantages([graded(1, None), graded(1, None)], "group_normalized")
    assert not batches().has_signal(done)
    assert batches().lay_out(done) is None


@pytest.mark.parametrize(
    ("aggregation", "finished", "short"),
    [("token_mean", 1 / 4, 1 / 4), ("sequence_mean", 1 / 6, 1 / 2), ("constant_length", 1 / 40, 1 / 40)],
)
def test_a_response_without_a_reward_carries_no_loss_and_no_share_of_the_step(
    aggregation: str, finished: float, short: float
) -> None:
    unknown = replace(CUT_OFF, scored=Scored(reward=None, lenient=None, parts=()))
    data = batches(aggregation=aggregation).lay_out([FINISHED, unknown, ONE_TOKEN])
    assert data is not None
    (batch,) = data.batches
    assert sorted(label for _, label, *_ in learned(batch)) == [END, END, 21, 22]
    weights = batch.token_weight[batch.loss_mask].tolist()
    assert sorted(weights) == pytest.approx(sorted([finished] * 3 + [short]))
    assert not batches().has_signal([unknown])
    # The trainer's own log-probabilities are wanted of everything that was generated.
    whole = batches().lay_out([FINISHED, unknown, ONE_TOKEN], everything=True)
    assert whole is not None
    assert whole.num_loss_tokens == 3 + 4 + 1


def test_the_loss_is_told_which_tokens_are_a_demonstrations() -> None:
    shown = replace(ONE_TOKEN, is_demonstration=True)
    data = replace(batches(), has_demonstrations=True).lay_out([FINISHED, shown])
    assert data is not None
    (batch,) = data.batches
    assert batch.is_demonstration is not None
    assert batch.is_demonstration.dtype == torch.bool
    marked = batch.is_demonstration.nonzero().flatten().tolist()
    assert [(int(batch.tokens[t]), int(batch.labels[t])) for t in marked] == [(14, END)]
    plain = batches().lay_out([FINISHED, shown])
    assert plain is not None
    assert plain.batches[0].is_demonstration is None


def test_a_loss_that_looks_at_no_reward_learns_from_every_response() -> None:
    unknown = replace(FINISHED, advantage=0.0, scored=Scored(reward=None, lenient=None, parts=()))
    every = replace(batches(mask_truncated=True), needs_reward=False)
    assert every.has_signal([unknown])
    assert not every.has_signal([CUT_OFF])
    data = every.lay_out([unknown, CUT_OFF])
    assert data is not None
    assert data.num_loss_tokens == 3


def with_experts(each: Response, *, of_layers: int = 2, first: int = 0) -> Response:
    """Experts that tell every (token, layer, choice) apart."""
    count = len(each.rollout.prompt_tokens) + len(each.rollout.response_tokens) - 1
    experts = np.arange(first, first + count * of_layers * 2, dtype=np.uint16).reshape(count, of_layers, 2)
    return replace(each, rollout=replace(each.rollout, experts=experts))


def test_every_token_that_the_engine_computed_stands_beside_its_experts() -> None:
    """Padding between sequences and behind them, and a demonstration, choose for themselves."""
    shown = replace(response((17,), (27, END)), is_demonstration=True)
    responses = [with_experts(FINISHED), shown, with_experts(CUT_OFF, first=100)]
    made = replace(
        batches(),
        layout=BatchLayout(sequence_multiple_of=4, pad_to_multiple_of=16),
        experts_shape=(2, 2),
    )
    data = made.lay_out(responses)
    assert data is not None
    batch = padded_batch(data.batches[0], 32)
    assert batch.experts is not None
    assert (batch.experts.dtype, batch.experts.shape) == (torch.int16, (32, 2, 2))
    expected = torch.full((32, 2, 2), OWN_CHOICE, dtype=torch.int16)
    starts = batch.cu_seqlens.tolist()
    for start, row in zip(starts, data.microbatch_rows[0][0], strict=False):
        if (experts := responses[row].rollout.experts) is not None:
            expected[start : start + len(experts)] = torch.from_numpy(experts.astype(np.int16))
    assert torch.equal(batch.experts, expected)
    assert int((expected[:, 0, 0] == OWN_CHOICE).sum()) == 32 - (5 + 5)


def test_a_micro_batch_without_any_experts_has_as_many_choices_as_others() -> None:
    """Or ranks would differ in what they count."""
    shown = replace(FINISHED, is_demonstration=True)
    data = replace(batches(), experts_shape=(3, 2)).lay_out([shown])
    assert data is not None
    assert data.batches[0].experts is not None
    assert data.batches[0].experts.shape[1:] == (3, 2)


def test_a_response_whose_experts_an_engine_has_lost_is_not_trained_on_others() -> None:
    with pytest.raises(RuntimeError, match="gave a response without its experts"):
        replace(batches(), experts_shape=(2, 2)).lay_out([with_experts(FINISHED), CUT_OFF])
