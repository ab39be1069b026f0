"""A policy so small that every response can be listed: expected gradients are sums, and must be exact.

Three tokens, of which 0 ends the response, at most three tokens long: 7 contexts, 15 responses.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.rl.advantages import dr_grpo, leave_one_out

V, LONGEST = 3, 3
CONTEXTS = [c for n in range(LONGEST) for c in itertools.product((1, 2), repeat=n)]
RESPONSES = [
    (*c, last) for c in CONTEXTS for last in range(V) if last == 0 or len(c) == LONGEST - 1
]  # ended, or cut at the longest
EXACT = {"rtol": 1e-12, "atol": 1e-14}  # float64 sums of 15 terms
OBJECTIVES = [
    {},
    {"clip_low": 0.05, "clip_high": 0.01},
    {"dual_clip": 3.0},
    {"ratio": "sequence"},
    {"objective": "cispo"},
    {"objective": "cispo", "ratio": "sequence"},
    {"correction": "tis"},
    {"correction": "icepop"},
]


def table(seed: int) -> Tensor:
    """[contexts, V] float64 logits."""
    return torch.randn(len(CONTEXTS), V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rewards() -> Tensor:
    """[responses] of both signs."""
    return torch.randn(len(RESPONSES), dtype=torch.float64, generator=torch.Generator().manual_seed(9))


CONTEXT_OF_TOKEN = torch.tensor([CONTEXTS.index(r[:t]) for r in RESPONSES for t in range(len(r))])
LABELS = torch.tensor([token for r in RESPONSES for token in r])
LENGTHS = torch.tensor([len(r) for r in RESPONSES])


def label_logprobs(logprobs: Tensor) -> Tensor:
    """[T] of the tokens of all responses, from [contexts, V]."""
    return logprobs[CONTEXT_OF_TOKEN, LABELS]


def probabilities(logprobs: Tensor) -> Tensor:
    """[responses] probability of each response, from [contexts, V]."""
    owner = torch.arange(len(RESPONSES)).repeat_interleave(LENGTHS)
    return (
        torch.zeros(len(RESPONSES), dtype=logprobs.dtype).index_add(0, owner, label_logprobs(logprobs)).exp()
    )


def every_response(advantages: Tensor, old: Tensor, rollout: Tensor | None = None) -> TokenBatch:
    """All responses in one pack; `old` and `rollout` are [T]."""
    return TokenBatch(
        tokens=LABELS,
        labels=LABELS,
        positions=torch.cat([torch.arange(n) for n in LENGTHS.tolist()]),
        loss_mask=torch.ones(LABELS.numel(), dtype=torch.bool),
        cu_seqlens=torch.cat([torch.zeros(1), LENGTHS.cumsum(0)]).to(torch.int32),
        token_weight=torch.ones(LABELS.numel()),
        advantages=advantages.repeat_interleave(LENGTHS),
        old_logprobs=old,
        rollout_logprobs=old if rollout is None else rollout,
    )


def expected_gradient(
    theta: Tensor, batch: TokenBatch, options: dict, weight: Tensor, reference: Tensor | None = None
) -> Tensor:
    """d / d theta of the sum over responses of weight * sum_t L_t, [contexts, V]."""
    theta = theta.clone().requires_grad_()
    prior = (
        None
        if reference is None
        else TokenDistribution.from_logits(reference[CONTEXT_OF_TOKEN], vocab_size=V)
    )
    policy = TokenDistribution.from_logits(theta[CONTEXT_OF_TOKEN], vocab_size=V)
    output = build_loss("grpo", options)(LossInputs(policy=policy, batch=batch, reference=prior))
    (gradient,) = torch.autograd.grad((output.token_loss * weight.repeat_interleave(LENGTHS)).sum(), theta)
    return gradient


def gradient_of_expected_reward(theta: Tensor, heat: float) -> Tensor:
    """d / d theta of -E[reward], from its definition."""
    theta = theta.clone().requires_grad_()
    value = (probabilities((theta / heat).log_softmax(1)) * rewards()).sum()
    return torch.autograd.grad(-value, theta)[0]


def test_the_list_of_responses_is_complete():
    total = probabilities(table(1).log_softmax(1)).sum()
    assert len(RESPONSES) == 15
    torch.testing.assert_close(total, torch.ones_like(total), **EXACT)


@pytest.mark.parametrize("heat", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_on_policy_the_expected_gradient_of_every_objective_is_that_of_the_expected_reward(
    options: dict, heat: float
):
    theta = table(1)
    logprobs = (theta / heat).log_softmax(1)
    batch = every_response(rewards(), label_logprobs(logprobs))
    gradient = expected_gradient(theta, batch, {**options, "temperature": heat}, probabilities(logprobs))
    torch.testing.assert_close(gradient, gradient_of_expected_reward(theta, heat), **EXACT)


@pytest.mark.parametrize(("estimator", "scale"), [(leave_one_out, 1.0), (dr_grpo, 2 / 3)])
def test_group_baselines_keep_the_direction_and_leave_one_out_also_the_length(estimator, scale: float):
    """All 15^3 groups of three: E over the other two responses of a response's advantage."""
    theta = table(1)
    p = probabilities(theta.log_softmax(1))
    scores, mean_advantage = rewards().tolist(), torch.zeros_like(p)
    for i, j, k in itertools.product(range(len(RESPONSES)), repeat=3):
        mean_advantage[i] += p[j] * p[k] * estimator([scores[i], scores[j], scores[k]])[0]
    batch = every_response(mean_advantage, label_logprobs(theta.log_softmax(1)))
    gradient = expected_gradient(theta, batch, {}, p)
    torch.testing.assert_close(gradient, scale * gradient_of_expected_reward(theta, 1.0), **EXACT)


@pytest.mark.parametrize("heat", [1.0, 1.4])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_expected_gradient_of_every_kl_estimator_is_that_of_the_kl(estimator: str, heat: float):
    """The KL of each context, weighted with how often the policy gets there."""
    theta, other = table(1), table(2)
    logprobs = (theta / heat).log_softmax(1)
    p = probabilities(logprobs)
    visits = torch.zeros(len(CONTEXTS), dtype=p.dtype).index_add(
        0, CONTEXT_OF_TOKEN, p.repeat_interleave(LENGTHS)
    )
    batch = every_response(torch.zeros(len(RESPONSES), dtype=p.dtype), label_logprobs(logprobs))
    options = {"kl_coefficient": 0.7, "kl_estimator": estimator, "temperature": heat}
    gradient = expected_gradient(theta, batch, options, p, reference=other)
    free = theta.clone().requires_grad_()
    mine, prior = (free / heat).log_softmax(1), (other / heat).log_softmax(1)
    kl = (visits * (mine.exp() * (mine - prior)).sum(1)).sum()
    torch.testing.assert_close(gradient, 0.7 * torch.autograd.grad(kl, free)[0], **EXACT)


def test_k1_and_k3_have_the_kl_as_their_expected_value_and_k2_is_near():
    theta = table(1)
    other = theta + 0.05 * table(2)
    logprobs = theta.log_softmax(1)
    p = probabilities(logprobs)
    policy = TokenDistribution.from_logits(theta[CONTEXT_OF_TOKEN], vocab_size=V)
    prior = TokenDistribution.from_logits(other[CONTEXT_OF_TOKEN], vocab_size=V)
    batch = every_response(torch.zeros(len(RESPONSES), dtype=p.dtype), label_logprobs(logprobs))
    inputs = LossInputs(policy=policy, batch=batch, reference=prior)
    metrics = build_loss("grpo", {"kl_coefficient": 1.0})(inputs).metrics
    found = {
        k: (metrics[f"grpo/kl_reference_{k}"] * p.repeat_interleave(LENGTHS)).sum()
        for k in ("k1", "k2", "k3")
    }
    kl = (p * (p.log() - probabilities(other.log_softmax(1)).log())).sum()
    torch.testing.assert_close(found["k1"], kl, rtol=1e-10, atol=0)  # terms that cancel to 1e-3 of their size
    torch.testing.assert_close(found["k3"], kl, rtol=1e-10, atol=0)
    torch.testing.assert_close(found["k2"], kl, rtol=0.1, atol=0)  # biased at third order in a step of 5 %


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_off_policy_single_tokens_are_reweighted_exactly_from_the_engine_to_the_policy(
    ratio: str, objective: str
):
    """Drawn by the engine, taken by TIS to the old policy and by the ratio to the new; nothing clipped."""
    theta, old, engine = table(1)[0], table(1)[0] + 0.1 * table(2)[0], table(1)[0] + 0.1 * table(3)[0]
    values = rewards()[:V]
    labels = torch.arange(V)
    batch = TokenBatch(
        tokens=labels,
        labels=labels,
        positions=torch.zeros_like(labels),
        loss_mask=torch.ones(V, dtype=torch.bool),
        cu_seqlens=torch.arange(V + 1, dtype=torch.int32),
        token_weight=torch.ones(V),
        advantages=values,
        old_logprobs=old.log_softmax(0),
        rollout_logprobs=engine.log_softmax(0),
    )
    free = theta.clone().requires_grad_()
    policy = TokenDistribution.from_logits(free.expand(V, V), vocab_size=V)
    options = {"ratio": ratio, "objective": objective, "clip_low": 1.0, "clip_high": 9.0, "correction": "tis"}
    loss = build_loss("grpo", options)(LossInputs(policy=policy, batch=batch)).token_loss
    (gradient,) = torch.autograd.grad((loss * engine.softmax(0)).sum(), free)
    again = theta.clone().requires_grad_()
    (truth,) = torch.autograd.grad(-(again.softmax(0) * values).sum(), again)
    torch.testing.assert_close(gradient, truth, **EXACT)


@pytest.mark.parametrize("heat", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_right_after_sampling_every_ratio_is_one_at_any_temperature_and_top_p(heat: float, top_p: float):
    """By the package's convention, the uncut log-probability at the sampling temperature."""
    theta = table(1)
    policy = TokenDistribution.from_logits(theta[CONTEXT_OF_TOKEN], vocab_size=V)
    old = policy.tempered(heat).logprobs(LABELS)
    engine = (theta / heat).log_softmax(1)
    ordered, places = engine.exp().sort(dim=1, descending=True)
    is_kept = torch.zeros_like(engine, dtype=torch.bool)
    is_kept.scatter_(1, places, ordered.cumsum(1) - ordered < top_p)
    kept_mass = (engine.exp() * is_kept).sum(1)  # [contexts] S
    drawn = label_logprobs(is_kept.double()).bool()  # tokens that the engine could have drawn
    batch = every_response(rewards(), old, label_logprobs(engine))
    batch = dataclasses.replace(batch, loss_mask=drawn)
    options = {"temperature": heat, "correction": "tis"}
    metrics = build_loss("grpo", options)(LossInputs(policy=policy, batch=batch)).metrics
    assert (metrics["grpo/ratio"] == 1).all()  # the same operations: exactly
    one = torch.ones(LABELS.numel(), dtype=torch.float64)
    torch.testing.assert_close(metrics["grpo/correction_weight"], one, **EXACT)
    # What the convention keeps out: log-probabilities renormalised over the kept tokens (vLLM's
    # processed_logprobs) would scale every token's loss with the kept mass.
    cut = dataclasses.replace(batch, rollout_logprobs=label_logprobs(engine - kept_mass.log()[:, None]))
    scaled = build_loss("grpo", options)(LossInputs(policy=policy, batch=cut)).metrics
    expected = torch.where(drawn, kept_mass[CONTEXT_OF_TOKEN], 1.0)
    torch.testing.assert_close(scaled["grpo/correction_weight"], expected, **EXACT)
    assert (expected < 0.95).any() == (top_p < 1)
