"""Cumulative sums in one order, which take torch's place on CUDA under train.deterministic."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.vocab_parallel.arithmetic import cumulative_sum, doubling_sum


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 129])
@pytest.mark.parametrize("dim", [0, 1])
def test_they_are_torchs_and_so_are_their_gradients(size: int, dim: int) -> None:
    torch.manual_seed(size)
    shape = (size, 5) if dim == 0 else (5, size)
    values, weights = torch.randn(2, *shape, dtype=torch.float64)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    found, expected = doubling_sum(ours, dim), theirs.cumsum(dim)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-13)


def test_where_torch_has_a_kernel_it_is_used() -> None:
    values = torch.randn(100)
    assert torch.equal(cumulative_sum(values, 0), values.cumsum(0))
