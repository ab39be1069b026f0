"""GIFT at the edges of its options: where the closed form must not overflow, and what its metric says."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sftrl import LossOutput, build_loss
from tests.unit.losses.batches import inputs_for

V = 13


def logits(seed: int) -> torch.Tensor:
    """[6, V] float64."""
    return torch.randn(6, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(u: torch.Tensor, **options: float) -> tuple[LossOutput, torch.Tensor]:
    """The loss on a fixed policy, and the policy's gradient."""
    z = logits(1).requires_grad_()
    output = build_loss("gift", options)(inputs_for(z, u))
    (gradient,) = torch.autograd.grad(output.token_loss.sum(), z)
    return output, gradient


@pytest.mark.parametrize("beta", [100.0, 1e4])  # e^100 overflows float32, e^1e4 float64
def test_an_enormous_beta_is_sft(beta: float):
    output, gradient = run(logits(2), beta=beta)
    z = logits(1).requires_grad_()
    sft = build_loss("sft")(inputs_for(z)).token_loss
    (truth,) = torch.autograd.grad(sft.sum(), z)
    torch.testing.assert_close(output.token_loss, sft, rtol=1e-12, atol=1e-12)  # float64 rounding
    torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)
    assert (output.metrics["gift/label_weight"] == 1).all()


def test_beta_zero_is_distillation_to_the_reference():
    output, gradient = run(logits(2), beta=0.0, eps=0.0)
    q, p = logits(2).softmax(1), logits(1).softmax(1)
    torch.testing.assert_close(output.token_loss, -(q * p.log()).sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, p - q, rtol=1e-12, atol=1e-12)  # float64 rounding
    assert (output.metrics["gift/label_weight"] == 0).all()


@pytest.mark.parametrize(("eps", "weight"), [(1e-10, 0.0463), (0.0, 0.0)])
def test_a_label_that_the_reference_rules_out_keeps_the_weight_that_eps_leaves_it(eps: float, weight: float):
    u = logits(2)
    u[torch.arange(6), inputs_for(u).batch.labels] = -torch.inf
    output, gradient = run(u, eps=eps)
    assert gradient.isfinite().all()
    expected = eps * math.expm1(20) / (1 + V * eps + eps * math.expm1(20))
    found = output.metrics["gift/label_weight"]
    torch.testing.assert_close(
        found, torch.full_like(found, expected), rtol=1e-10, atol=0
    )  # exp and log of 20
    assert found[0].item() == pytest.approx(weight, abs=1e-4)  # the number METHODS gives, to its digits
