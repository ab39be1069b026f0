"""pass@k against counting, reward statistics, and the disagreement of engine and trainer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_sftrl.rl.advantages import logprob_mismatch, mean_pass_at_k, pass_at_k, reward_statistics


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_equals_counting_every_choice_of_k_responses(num_samples: int):
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        is_right = [i < num_correct for i in range(num_samples)]
        choices = [any(choice) for choice in itertools.combinations(is_right, k)]
        assert pass_at_k(num_samples, num_correct, k) == sum(choices) / len(choices)


def test_pass_at_k_is_unbiased_for_the_probability_of_a_success_in_k_draws():
    p, n, k = 0.3, 8, 3
    expected = math.fsum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k, rel=1e-13)  # float64 rounding


def test_pass_at_k_keeps_its_digits_where_binomials_overflow_or_cancel():
    assert pass_at_k(100_000, 1, 1) == 1 / 100_000
    assert pass_at_k(4096, 1, 2048) == 0.5
    assert pass_at_k(4096, 4000, 256) == 1.0  # 96 wrong ones cannot fill 256 places


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_out_of_range_is_refused(n: int, c: int, k: int):
    with pytest.raises(ValueError, match=f"got {c} correct of {n}, k = {k}; generate at least k"):
        pass_at_k(n, c, k)


def test_every_group_counts_once_in_mean_pass_at_k():
    groups = {"a": [True, False], "b": [False] * 8}
    assert mean_pass_at_k(groups, 1) == 0.25
    assert mean_pass_at_k(groups, 2) == 0.5
    with pytest.raises(ValueError, match="generate at least k responses"):
        mean_pass_at_k(groups, 3)
    with pytest.raises(ValueError, match="expected at least one group"):
        mean_pass_at_k({}, 1)


def test_reward_statistics_are_over_responses_and_zero_variance_over_groups():
    found = reward_statistics({1: [1.0, 0.0, 0.0], 2: [1.0, 1.0], 3: [0.0]})
    all_rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert found.mean == 0.5
    assert found.std == pytest.approx(all_rewards.std().item(), rel=1e-14)
    assert (found.num_groups, found.num_zero_variance_groups) == (3, 2)
    assert reward_statistics({1: [0.7]}).std == 0.0
    with pytest.raises(ValueError, match="sample 0: expected a finite reward"):
        reward_statistics({1: [math.nan]})


def test_mismatch_is_over_loss_tokens_only_and_symmetric():
    first = torch.tensor([-1.0, -2.0, -3.0, math.nan, -4.0])
    second = torch.tensor([-1.5, -2.0, -2.0, 5.0, -math.inf])
    mask = torch.tensor([1, 1, 1, 0, 0]).bool()
    found = logprob_mismatch(first, second, mask)
    assert found == logprob_mismatch(second, first, mask)
    assert (found.mean, found.maximum, found.percentile_999, found.num_tokens) == (0.5, 1.0, 1.0, 3)
    mean_of_exponentials = (math.exp(0.5) + 1 + math.e) / 3
    assert found.multiplicative_error == pytest.approx(mean_of_exponentials, rel=1e-14)


@pytest.mark.parametrize(("count", "rank"), [(1000, 999), (1001, 1000), (2000, 1998), (10, 10)])
def test_the_percentile_leaves_one_token_in_a_thousand_above_it(count: int, rank: int):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    difference = (order + 1).double()
    mask = torch.ones(count, dtype=torch.bool)
    assert logprob_mismatch(difference, torch.zeros(count), mask).percentile_999 == rank


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logprob_that_is_no_number_is_an_infinite_mismatch(bad: float):
    first, mask = torch.tensor([-1.0, bad]), torch.ones(2, dtype=torch.bool)
    for second in (torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, bad])):
        found = logprob_mismatch(first, second, mask)
        assert found.maximum == found.mean == found.multiplicative_error == math.inf


def test_mismatch_without_a_loss_token_or_of_other_shapes_is_refused():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="at least one loss token, got none"):
        logprob_mismatch(x, x, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="three vectors of one shape"):
        logprob_mismatch(x, x[:2], torch.ones(3, dtype=torch.bool))
