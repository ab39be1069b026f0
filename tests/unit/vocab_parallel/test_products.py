"""The output layer's products against float64 in every memory order they meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel import OutputLayer
from megatron_sftrl.vocab_parallel.output_layer import GradientSums


def factors(num_tokens: int, num_columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H], gradient [T, V] inside wider memory, as padded logits are."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator).to(dtype) for n in (num_tokens, num_columns))
    wide = torch.randn(num_tokens, num_columns + 3, generator=generator).to(dtype)
    return hidden, weight, wide[:, :num_columns]


def products(hidden: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in the first rows of a larger buffer, hidden's gradient, weight's gradient added to 2."""
    layer = OutputLayer(hidden=hidden, weight=weight)
    buffer = torch.full((len(hidden) + 2, len(weight)), 7.0, dtype=hidden.dtype)
    sums = GradientSums(hidden=torch.zeros_like(hidden), weight=torch.full_like(weight, 2.0))
    logits = layer.logits(slice(None), buffer)
    layer.add_gradients(slice(None), gradient, sums)
    assert torch.equal(buffer[: len(hidden)], logits)
    assert (buffer[len(hidden) :] == 7.0).all()
    assert sums.hidden is not None
    assert sums.weight is not None
    return logits, sums.hidden, sums.weight


@pytest.mark.parametrize("num_tokens", [0, 1, 11])
@pytest.mark.parametrize("num_columns", [1, 7, 8, 9, 31])
def test_the_products_are_those_of_float64(num_tokens: int, num_columns: int) -> None:
    hidden, weight, gradient = factors(num_tokens, num_columns, torch.float32)
    wide = [value.double() for value in (hidden, weight, gradient)]
    expected = wide[0] @ wide[1].T, wide[2] @ wide[1], 2.0 + wide[2].T @ wide[0]
    for ours, exact in zip(products(hidden, weight, gradient), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64() -> None:
    hidden, weight, gradient = factors(11, 31, torch.float64)
    expected = hidden @ weight.T, gradient @ weight, 2.0 + gradient.T @ hidden
    for ours, exact in zip(products(hidden, weight, gradient), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)
