"""Intervals hold as often as they say, p-values are exact where all cases can be counted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_sftrl.apps.compare.statistics import (
    _half_width,
    _variances,
    correlation_of,
    holm,
    mean_of,
    p_value,
    sign_flip_p,
    spearman,
    student_quantile,
    two_sided,
)


@pytest.mark.parametrize(
    ("num_seeds", "of_seeds", "of_prompts", "rest"),
    [(3, 0.02, 0.1, 0.3), (3, 0.1, 0.1, 0.3), (5, 0.03, 0.1, 0.3), (10, 0.03, 0.2, 0.3)],
)
def test_an_interval_of_95_percent_holds_in_95_percent_of_the_cases(
    num_seeds: int, of_seeds: float, of_prompts: float, rest: float
) -> None:
    """Where seeds, prompts and both together vary the score, as other runs and other test sets do."""
    draw, num_prompts, cases = np.random.default_rng(0), 100, 1500
    # The quantiles of each case are the same: looked up once.
    rest_freedom = (num_seeds - 1) * (num_prompts - 1)
    factors = {
        freedom: student_quantile(0.95, freedom) for freedom in (num_seeds - 1, num_prompts - 1, rest_freedom)
    }
    held = 0
    for _ in range(cases):
        values = (
            of_seeds * draw.normal(size=(num_seeds, 1))
            + of_prompts * draw.normal(size=(1, num_prompts))
            + rest * draw.normal(size=(num_seeds, num_prompts))
        )
        parts = _variances(values)
        half = math.sqrt(sum(max(v * factors[freedom] ** 2 for v, freedom in part) for part in parts))
        held += abs(values.mean()) <= half
    assert half == pytest.approx(_half_width(parts, 0.95))
    assert 0.93 <= held / cases <= 0.99


def test_seeds_with_equal_means_by_chance_are_no_certainty() -> None:
    """Accuracy moves in steps: two seeds often agree to the last digit, and Holm leaves a p of 0 as it is."""
    values = np.asarray([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.5]])
    mean, p = mean_of(values), p_value(values)
    assert mean is not None
    assert mean.low is not None
    assert mean.low < 0 < mean.value
    assert p is not None
    assert p > 0.05


def test_values_that_do_not_vary_say_nothing_of_how_sure_they_are() -> None:
    mean = mean_of(np.ones((2, 5)))
    assert mean is not None
    assert (mean.value, mean.low, mean.high) == (1.0, None, None)
    assert p_value(np.ones((2, 5))) is None


def test_the_mean_leaves_out_prompts_that_were_not_judged_and_its_p_value_belongs_to_its_interval() -> None:
    draw = np.random.default_rng(1)
    values = draw.normal(size=(3, 40)) * 0.2 + 0.1
    mean = mean_of(np.concatenate([values, [[1.0], [np.nan], [1.0]]], axis=1))
    assert mean == mean_of(values)
    assert mean is not None
    assert mean.low is not None
    p = p_value(values)
    assert p is not None
    level = _half_width(_variances(values), 1 - p)
    assert level == pytest.approx(mean.value, rel=1e-6)
    assert (p < 0.05) == (mean.low > 0)
    shifted = p_value(values - mean.low)  # an interval that ends at 0 exactly
    assert shifted == pytest.approx(0.05, rel=1e-6)
    assert mean_of(np.full((2, 3), np.nan)) is None
    assert p_value(np.zeros((3, 4))) == 1.0


def test_one_seed_has_an_interval_over_prompts_and_one_value_has_none() -> None:
    values = np.asarray([[0.0, 1.0, 1.0, 0.5]])
    mean = mean_of(values)
    assert mean is not None
    assert mean.high is not None
    error = values.std(ddof=1) / 2
    assert mean.high - mean.value == pytest.approx(3.182446 * error, rel=1e-6)
    alone = mean_of(np.asarray([[0.5]]))
    assert alone is not None
    assert (alone.low, alone.high) == (None, None)


def test_the_permutation_test_counts_all_signs() -> None:
    values = [0.5, -0.25, 1.0, 0.75, 0.0]
    total = abs(sum(values))
    signs = list(itertools.product((-1, 1), repeat=len(values)))
    extreme = sum(abs(sum(s * v for s, v in zip(each, values, strict=True))) >= total for each in signs)
    assert sign_flip_p(values) == extreme / len(signs) == 0.25
    assert p_value(np.asarray([values])) == 0.25
    assert sign_flip_p([1.0] * 10) == 2 / 2**10
    many = sign_flip_p([1.0] * 12 + [-1.0] * 5)  # drawn: 17 values; exactly P(|B - 8.5| >= 3.5)
    exact = 2 * sum(math.comb(17, k) for k in range(6)) / 2**17
    assert many == pytest.approx(exact, abs=0.01)


def test_holm_by_hand() -> None:
    """Smallest first: 4 * 0.01, 3 * 0.015 = 0.045, 2 * 0.02 = 0.04 below the one before it, 1 * 0.9."""
    found = holm({"a": 0.02, "b": 0.01, "c": 0.9, "d": 0.015})
    assert found == pytest.approx({"a": 0.045, "b": 0.04, "c": 0.9, "d": 0.045})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 200])
def test_students_tail_is_the_integral_of_its_density(freedom: int) -> None:
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    for t in (0.1, 1.0, 2.5, 8.0):
        x = np.linspace(0, t, 20001)
        density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
        inside = 2 * np.trapezoid(density, x)
        assert two_sided(t, freedom) == pytest.approx(1 - inside, abs=1e-8)
        if t < 8.0:  # beyond it 1 less the tail has lost its digits
            assert student_quantile(1 - two_sided(t, freedom), freedom) == pytest.approx(t, rel=1e-6)


def test_spearman_is_pearson_of_mean_ranks() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        x, y = draw.integers(4, size=(2, 6)).astype(float)
        ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v] for v in (x, y)]
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(np.asarray([1.0, 2, 3]), np.asarray([3.0, 2, 1])) == -1.0
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_a_rank_correlation_is_sure_where_arms_lie_apart_and_unsure_where_they_do_not() -> None:
    draw = np.random.default_rng(0)
    apart = np.arange(5.0)[:, None, None]
    noise = draw.normal(size=(2, 5, 3, 50))
    clear = correlation_of(apart + 0.01 * noise[0], apart + 0.01 * noise[1])
    assert clear is not None
    assert (clear.value, clear.low, clear.high) == (1.0, 1.0, 1.0)
    unclear = correlation_of(0.01 * apart + noise[0], 0.01 * apart + noise[1])
    assert unclear is not None
    assert unclear.low is not None
    assert unclear.high is not None
    assert unclear.low < 0 < unclear.high
    per_seed = correlation_of(apart + 0.01 * noise[0, :, :, :1], -apart + 0.01 * noise[1])
    assert per_seed is not None
    assert (per_seed.value, per_seed.high) == (-1.0, -1.0)
    assert correlation_of(np.ones((5, 3, 50)), apart + noise[0]) is None
    assert correlation_of(noise[0][:2], noise[1][:2]) is None
