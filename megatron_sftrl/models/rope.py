"""Rotary position frequencies: every scaling that a supported config.json can ask for, as one function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """How positions become angles: angle = position * frequency, cos and sin times attention_factor.

    Args:
        kind: default (RoFormer), linear (positions divided by factor), llama3 (long wavelengths divided by
            factor), yarn (arXiv:2309.00071: a ramp between both, by number of rotations) or longrope
            (arXiv:2402.13753: each frequency divided by a number of its own).
        theta: base of the frequencies.
        factor: context extension, >= 1; 1 for default.
        original_length: positions before the extension, tokens (llama3, yarn, longrope).
        low_freq_factor, high_freq_factor: original_length over them bounds llama3's interpolated wavelengths.
        beta_fast, beta_slow: rotations over original_length that bound yarn's ramp.
        truncate: yarn's ramp begins and ends at whole dimensions.
        attention_factor: multiplies cos and sin (yarn, longrope), 1 otherwise.
        fraction: of each head's dimensions that turn, the first ones.
        interleaved: neighbours turn together; otherwise dimensions that are half of the turning ones apart.
        mscale, mscale_all_dim: what attention_factor was made of, for who reads them alone (yarn).
        query_beta: b > 0 multiplies a query at position p by 1 + b ln(1 + floor(p / original_length)).
        short_factors, long_factors: what frequencies are divided by (longrope) in sequences of up to
            original_length tokens, and in longer ones: these are not built, their factors are kept for files.
    """

    kind: Literal["default", "linear", "llama3", "yarn", "longrope"]
    theta: float
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    fraction: float = 1.0
    interleaved: bool = False
    query_beta: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def turning(self, head_dim: int) -> int:
        """Dimensions of a head that turn."""
        return int(head_dim * self.fraction)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[turning dimensions / 2] fp32 radians per position, the same fp32 numbers as transformers computes."""
    head_dim = rope.turning(head_dim)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(rope.theta**exponents, rope, head_dim)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factors, dtype=torch.float32) * rope.theta**exponents)
    return plain


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    assert rope.original_length is not None
    wavelengths = 2 * math.pi / plain
    longest_kept = rope.original_length / rope.high_freq_factor
    shortest_divided = rope.original_length / rope.low_freq_factor
    between = rope.high_freq_factor - rope.low_freq_factor
    kept = (rope.original_length / wavelengths - rope.low_freq_factor) / between
    interpolated = (1 - kept) * plain / rope.factor + kept * plain
    scaled = torch.where(wavelengths > shortest_divided, plain / rope.factor, plain)
    is_between = ~(wavelengths < longest_kept) & ~(wavelengths > shortest_divided)
    return torch.where(is_between, interpolated, scaled)


def _yarn(powers: Tensor, rope: Rope, head_dim: int) -> Tensor:
    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original length."""
        assert rope.original_length is not None
        turns = rope.original_length / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return (1.0 / (rope.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """0.1 ln(factor) + 1 (arXiv:2309.00071, eq. 22), or the ratio of two of these with given multipliers."""

    if mscale and mscale_all_dim:
        return _concentration(factor, mscale) / _concentration(factor, mscale_all_dim)
    return _concentration(factor, 1.0)


def longrope_attention_factor(factor: float, original_length: int) -> float:
    """sqrt(1 + ln(factor) / ln(original_length)) of a model that is extended by `factor`."""
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


def latent_attention_multiplier(rope: Rope, head_dim: int) -> float:
    """Of queries times keys in latent attention, where yarn's concentration is squared into it."""
    return _concentration(rope.factor, rope.mscale_all_dim) ** 2 / math.sqrt(head_dim)


def _concentration(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
