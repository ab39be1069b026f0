"""Means, differences and rank correlations over seeds and prompts, and how far they can be trusted.

A run's score is a mean over prompts, and seeds and prompts are both samples: another seed trains other
weights, another test set has other prompts. The prompts are the same for every seed, so that a set which
happens to be hard is hard for all of them; prompts redrawn for each seed alone would average that away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
_NUM_DRAWS = 2000
_MOST_ENUMERATED = 16
_NUM_FLIPS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over seeds and prompts with its interval of 95 %; with num_seeds 1 that is about prompts alone.

    low and high are None where all values are the same, or there is one: how they vary is then unknown.
    """

    value: float
    low: float | None
    high: float | None
    num_seeds: int
    num_prompts: int


def mean_of(values: Array) -> Mean | None:
    """The mean of values [seeds, prompts]; a prompt without a value (NaN) under any seed is left out.

    The squares of two half-widths are added: that of the seeds' means, with Student's t of as few seeds as
    there are, and that of the prompts' means. The first is at least that of what seeds and prompts do
    together, since accuracy moves in steps and two seeds' means are often equal. It holds what it says or
    more; of a percentile bootstrap's intervals of 95 % over three seeds 85 % hold where seeds differ most.
    None where no prompt has every value.
    """
    whole = _whole(values)
    num_seeds, num_prompts = whole.shape
    if not num_prompts:
        return None
    value = float(whole.mean())
    low = high = None
    if np.ptp(whole):
        half = _half_width(_variances(whole), LEVEL)
        low, high = value - half, value + half
    return Mean(value=value, low=low, high=high, num_seeds=num_seeds, num_prompts=num_prompts)


def p_value(values: Array) -> float | None:
    """Two-sided, of a mean 0 of values [seeds, prompts]: 1 less the level of the interval that ends at 0.

    With one seed that of a permutation test over prompts. None of fewer than two values, and of several
    seeds' values that are all the same and not 0.
    """
    whole = _whole(values)
    if whole.size < 2:
        return None
    if len(whole) == 1:
        return sign_flip_p(whole[0].tolist())
    if not np.ptp(whole):
        return None if whole.any() else 1.0
    value, parts = abs(float(whole.mean())), _variances(whole)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _half_width(parts, 1 - middle) < value else (middle, high)
    return (low + high) / 2


def _whole(values: Array) -> Array:
    return values[:, ~np.isnan(values).any(axis=0)]


Part = tuple[tuple[float, int], ...]
"""Of the variance of a mean: estimates with their degrees of freedom, of which the widest interval counts."""


def _variances(values: Array) -> list[Part]:
    """The parts of the variance of the mean of [seeds, prompts]: of seeds, and of prompts."""
    num_seeds, num_prompts = values.shape
    of_seeds, of_prompts = values.mean(axis=1), values.mean(axis=0)
    if num_seeds == 1 or num_prompts == 1:
        return [((float(values.var(ddof=1)) / values.size, values.size - 1),)]
    rest = values - of_seeds[:, None] - of_prompts + values.mean()
    of_rest = (num_seeds - 1) * (num_prompts - 1)
    # What seeds and prompts do together varies the seeds' means already.
    shared = float((rest**2).sum()) / of_rest / values.size
    return [
        ((float(of_seeds.var(ddof=1)) / num_seeds, num_seeds - 1), (shared, of_rest)),
        ((max(0.0, float(of_prompts.var(ddof=1)) / num_prompts - shared), num_prompts - 1),),
    ]


def _half_width(parts: Sequence[Part], level: float) -> float:
    return math.sqrt(
        sum(
            max(variance * student_quantile(level, freedom) ** 2 for variance, freedom in part)
            for part in parts
        )
    )


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p-value of mean 0 when every value's sign is a fair coin: a paired permutation test.

    All signs are tried for up to 16 values other than 0, otherwise 20,000 random ones, the observed included.
    """
    numbers = np.asarray([value for value in values if value], np.float64)
    if not len(numbers):
        return 1.0
    observed = abs(numbers.sum()) * (1 - 1e-12)
    if len(numbers) <= _MOST_ENUMERATED:
        signs = np.asarray(list(itertools.product((-1.0, 1.0), repeat=len(numbers))))
        return float((np.abs(signs @ numbers) >= observed).mean())
    generator = np.random.default_rng(0)
    extreme = 1
    for _ in range(_NUM_FLIPS // 1000):
        signs = generator.integers(2, size=(1000, len(numbers))) * 2.0 - 1.0
        extreme += int((np.abs(signs @ numbers) >= observed).sum())
    return extreme / (_NUM_FLIPS + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number: the i-th smallest of m times m - i + 1, never falling."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - place)))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


# Student's distribution.


def student_quantile(level: float, freedom: float) -> float:
    """The t with P(|T| < t) = level, for a level below 1."""
    low, high = 0.0, 1.0
    while 1 - two_sided(high, freedom) < level and high < 1e300:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - two_sided(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def two_sided(t: float, freedom: float) -> float:
    """P(|T| > t), by the regularised incomplete beta function."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), by its continued fraction (DLMF 8.17.22) on the side where that converges."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # Lentz's way from the first term on; far fewer than 1000 are needed.
    fraction, top, bottom = 1.0, 1.0, 0.0
    for number in range(1, 1000):
        m = number // 2
        if number % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        bottom = 1.0 / (1.0 + term * bottom)
        top = 1.0 + term / top
        fraction *= top * bottom
        if abs(top * bottom - 1.0) < 1e-15:
            break
    return math.exp(front) / (a * fraction)


# Does a number of the SFT checkpoints put the arms into the order in which they stand after RL?


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Spearman's rank correlation over arms, and its interval of 95 %; None where the draws have no order."""

    value: float
    low: float | None
    high: float | None


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rho along the last axis, ties at their mean rank; NaN where one side is constant."""
    ranks = [_ranks(each) - (each.shape[-1] + 1) / 2 for each in (x, y)]
    squares = [(each**2).sum(axis=-1) for each in ranks]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (ranks[0] * ranks[1]).sum(axis=-1) / np.sqrt(squares[0] * squares[1])


def _ranks(values: Array) -> Array:
    below = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return below + (equal + 1) / 2


def correlation_of(before: Array, after: Array) -> Correlation | None:
    """How the arms' means [arms, seeds, prompts] of one number go with those of another.

    The interval is a bootstrap: seeds are drawn, and prompts, the same ones for every arm and seed and for
    both numbers where these have the same prompts. A number with one value per seed has one prompt.
    None where an order does not exist: fewer than three arms, or a constant.
    """
    pairs = [each[:, :, ~np.isnan(each).any(axis=(0, 1))] for each in (before, after)]
    if len(before) < 3 or not all(each.shape[2] for each in pairs):
        return None
    if before.shape == after.shape:
        both = ~(np.isnan(before) | np.isnan(after)).any(axis=(0, 1))
        pairs = [before[:, :, both], after[:, :, both]]
    value = float(spearman(*(each.mean(axis=(1, 2)) for each in pairs)))
    if math.isnan(value):
        return None
    generator = np.random.default_rng(0)
    seeds = _counts(generator, before.shape[1])
    prompts = {length: _counts(generator, length) for length in sorted({each.shape[2] for each in pairs})}
    means = [np.einsum("asp,ds,dp->da", each, seeds, prompts[each.shape[2]], optimize=True) for each in pairs]
    # The same sums in another order of addition are no difference in rank.
    drawn = spearman(*(np.round(each / each.max(initial=1.0), 12) for each in means))
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Correlation(value=value, low=None, high=None)
    low, high = (float(each) for each in np.percentile(drawn, [100 * (1 - LEVEL) / 2, 50 * (1 + LEVEL)]))
    return Correlation(value=value, low=low, high=high)


def _counts(generator: np.random.Generator, length: int) -> Array:
    """How often each of `length` things is drawn, in every draw: [draws, length]; once where it is alone."""
    return generator.multinomial(length, np.full(length, 1 / length), size=_NUM_DRAWS).astype(np.float64)
