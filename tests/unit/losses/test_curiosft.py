"""The teacher's temperature, against a transcription that goes token by token, and the divergences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_sftrl import TokenDistribution, build_loss
from megatron_sftrl.losses.curiosft import CurioSftOptions, solve_temperature
from tests.unit.losses.batches import inputs_for

V = 700


def entropy_of(logits: list[float], tau: float) -> float:
    """Nats, of softmax(logits / tau)."""
    largest = max(logits)
    exps = [math.exp((x - largest) / tau) for x in logits]
    total = sum(exps)
    return -sum(e / total * math.log(e / total) for e in exps if e > 0)


def slow_temperature(logits: Tensor, config: CurioSftOptions) -> float:
    """METHODS section 4 for one token, by hand."""
    top = sorted(logits.tolist(), reverse=True)[: config.top_k]
    plain = entropy_of(top, 1.0)
    goal = plain + 0.5 / (1 + math.exp(-2 * (plain - config.pivot)))
    if entropy_of(logits.tolist(), 1.0) <= config.factual_entropy or entropy_of(top, config.tau_min) >= goal:
        return config.tau_min
    if entropy_of(top, config.tau_max) <= goal:
        return config.tau_max
    low, high = config.tau_min, config.tau_max
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_of(top, middle) < goal else (low, middle)
    return (low + high) / 2


def teacher_logits() -> Tensor:
    """[12, V] from nearly certain to nearly uniform, so that every branch is taken."""
    noise = torch.randn(12, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scales = torch.tensor([0.1, 0.5, 1, 2, 3, 4, 5, 6, 8, 12, 30, 100], dtype=torch.float64)
    return scales[:, None] * noise


def test_bisection_equals_the_token_by_token_transcription():
    u, config = teacher_logits(), CurioSftOptions()
    teacher = TokenDistribution.from_logits(u, vocab_size=V)
    tau = solve_temperature(teacher.top_k(config.top_k), teacher.entropy(), config)
    expected = torch.tensor([slow_temperature(row, config) for row in u], dtype=torch.float64)
    assert {config.tau_min, config.tau_max} < set(expected.tolist())  # both ends and the inside are covered
    torch.testing.assert_close(tau, expected, rtol=0, atol=1e-12)  # the same midpoints, float64


def test_a_fixed_temperature_is_tau_min_for_every_token():
    inputs = inputs_for(torch.randn(12, V, dtype=torch.float64), teacher_logits())
    output = build_loss("curiosft", {"temperature": "fixed", "tau_min": 1.3})(inputs)
    assert (output.metrics["curiosft/tau"] == 1.3).all()
    assert inputs.reference is not None
    target = inputs.reference.tempered(1.3).logprobs(inputs.batch.labels)
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    expected = -logprobs + 0.5 * (logprobs - target) ** 2
    torch.testing.assert_close(output.token_loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", ["k2", "forward_kl", "reverse_kl"])
def test_divergences_and_their_gradients_follow_their_definitions(divergence: str):
    z = torch.randn(12, V, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    inputs = inputs_for(z, teacher_logits())
    output = build_loss("curiosft", {"divergence": divergence, "alpha": 0.7})(inputs)
    (gradient,) = torch.autograd.grad(output.token_loss.sum(), z)

    tau = output.metrics["curiosft/tau"][:, None]
    logp, logq = z.log_softmax(1), (teacher_logits() / tau).log_softmax(1)
    lp, lt = (x.gather(1, inputs.batch.labels[:, None]).squeeze(1) for x in (logp, logq))
    term = {
        "k2": 0.5 * (lp - lt) ** 2,
        "forward_kl": (logq.exp() * (logq - logp)).sum(1),
        "reverse_kl": (logp.exp() * (logp - logq)).sum(1),
    }[divergence]
    expected = -lp + 0.7 * term
    (truth,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(output.token_loss, expected, rtol=1e-10, atol=1e-10)  # float64, values to 1e3
    torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-10)
    assert set(output.metrics) == {"curiosft/teacher_entropy", "curiosft/tau", f"curiosft/{divergence}"}
