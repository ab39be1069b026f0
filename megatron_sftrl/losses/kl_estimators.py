"""KL(policy || reference) from one sampled token: three estimates of its value, one gradient.

With d = log(reference(y) / policy(y)) and y drawn from the policy (Schulman, joschu.net/blog/kl-approx.html):

    k1 = -d               unbiased, may be negative
    k2 = d^2 / 2          biased, small variance
    k3 = e^d - 1 - d      unbiased, never negative

A good estimate of a value is not a loss whose gradient is right. With g = grad log policy(y), E[g] = 0:

    grad KL = E[-d g]                           what is wanted
    autograd of k1 = g                          0 in expectation
    autograd of k2 = -d g                       what is wanted, sample by sample
    autograd of k3 = (1 - e^d) g                the gradient of KL(reference || policy)

(arXiv:2510.01555 derives the same; OpenRLHF PR 1314, and the k3 loss of most trainers, have the others.) The
loss below therefore has the chosen estimate as its value and -d g as its gradient for all three, so that
`kl_estimator` decides what is logged and added to the loss, never where training goes. -d g is also what
the score function estimate g k + grad k gives for k3, sample by sample, and for k1 up to the baseline g.

The KL is that of one token's distribution given its context: what a token does to the KL of later tokens is
left out, as it is in GRPO. The samples are taken as the policy's own; after several updates on one rollout
they are the old policy's, and the estimate is off by as much as the ratio is off 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimates(log_ratio: Tensor) -> dict[KlEstimator, Tensor]:
    """Every estimate's value, [T] nats.

    Args:
        log_ratio: [T] d = log(other(y) / sampler(y)), bounded; the estimates are of KL(sampler || other).
    """
    return {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": torch.expm1(log_ratio) - log_ratio}


def kl_loss(log_ratio: Tensor, estimator: KlEstimator) -> Tensor:
    """[T] nats: the estimate's value with the gradient of KL(policy || reference).

    Args:
        log_ratio: [T] d = log(reference(y) / policy(y)), bounded; differentiable in the policy.
        estimator: whose value.
    """
    k2 = log_ratio.square() / 2
    return kl_estimates(log_ratio.detach())[estimator] + (k2 - k2.detach())
