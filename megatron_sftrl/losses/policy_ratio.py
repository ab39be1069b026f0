"""How far the policy has moved from the one that sampled: importance ratios and rollout correction.

Three log-probabilities of the same sampled token meet here, and only mean something together when all three
are of one kind. The convention of this package: log softmax(z / T)[y], T the sampling temperature, over the
whole vocabulary, before top-k or top-p cut it.

    logprobs           the policy now, by the trainer
    old_logprobs       the policy at the beginning of the step, by the trainer
    rollout_logprobs   the policy that sampled, as the rollout engine computed it

Ordinarily a step begins with the policy that sampled, and old differs from rollout by what two programs make
of the same weights. Under rollout.ahead the samples are one step older, and old - rollout is that step, too.
The whole ratio of the policy to its sampler has two factors,

    exp(logprobs - rollout_logprobs) = exp(logprobs - old_logprobs) * exp(old_logprobs - rollout_logprobs)

of which the first is clipped, around where the step begins, and the second is a constant weight with a bound
of its own (correction_weight): the decoupled objective of arXiv:2110.00641, which AReaL (arXiv:2505.24298)
takes for stale samples. One clip around the sampler instead would hold the policy back to where it was. In
the first update the first factor is 1, and the gradient is that of truncated importance sampling with the
engine's log-probability as the denominator. correction none takes the second factor for 1.

Why before the cut: the trainer sees every logit and no cut. Had the engine renormalised over the kept
tokens (vLLM's logprobs_mode="processed_logprobs" under top_p < 1 or top_k), old - rollout would be log S, S
the kept mass, for every token: a correction that scales the loss by S and corrects nothing (TRL #6789; verl
#6240 asks the same). TRL is as described there; prime-rl (PR 2601) repeats the cut in the trainer instead,
which needs the sorted vocabulary of every token and an answer for tokens at the edge. With the convention
here all ratios are 1 right after sampling, at any T and top_p; what top_p < 1 still changes is which tokens
are seen, and with that the expectation. An engine that cannot report the uncut log-probability has to refuse
top_p < 1 and top_k when it is used for training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sftrl.losses.sequences import Sequences

LARGEST_LOG_RATIO = 20.0
"""Nats. exp(20) = 4.9e8 is far outside of any clip range, and still finite when squared or summed in fp32:
without a bound one token at exp(89) = inf puts inf * 0 = NaN into the gradient of the clipped branch."""

Correction = Literal["none", "tis", "icepop"]


def log_ratio(logprobs: Tensor, other: Tensor, loss_mask: Tensor) -> Tensor:
    """clip(logprobs - other, -20, 20), [T] nats; 0 without gradient where masked, whatever stands there."""
    bounded = (logprobs - other).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return torch.where(loss_mask, bounded, 0.0)


def sequence_log_ratio(token_log_ratio: Tensor, sequences: Sequences) -> Tensor:
    """Value: the mean log ratio of the sequence. Gradient: of this token's own log ratio.

        s_t = sg(s) pi(y_t) / sg(pi(y_t)),    s = exp(mean_t log ratio)

    (GSPO-token, arXiv:2507.18071, eq. 13 and 14.) With advantages and weights that are constant inside a
    sequence its objective and gradient are those of GSPO, eq. 5: there each of a sequence's N tokens has
    1 / N of the gradient of all N losses, here all of its own. It needs no collective in the backward under
    context parallelism, and stays right when advantages differ inside a sequence.
    """
    mean = sequences.mean(token_log_ratio.detach())
    return mean + (token_log_ratio - token_log_ratio.detach())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CorrectionWeight:
    """What each token's loss is multiplied by, a constant for the gradient.

    weight [T] >= 0 is 1 where masked; is_limited [T]: `tis` cut the ratio, or `icepop` dropped the token.
    """

    weight: Tensor
    is_limited: Tensor


def correction_weight(
    old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, correction: Correction, cap: float
) -> CorrectionWeight:
    """The weight of samples that the engine drew, under the trainer's version of the same policy.

        k = exp(old - rollout)
        tis:     min(k, C)                       (fengyao.notion.site/off-policy-rl; C = 2)
        icepop:  k where 1 / C <= k <= C, else 0    (arXiv:2510.18855, section 3; there 0.5 <= k <= 5)

    A token that the trainer gives probability 0 gets the weight 0, whatever the engine says; one that the
    engine reports at probability 0 is limited like any other too large ratio. Log-probabilities are [T] nats
    by the convention at the top. With `none` the weight is 1; `cap` is C > 1.
    """
    log_k = (old_logprobs - rollout_logprobs).detach()
    log_k = log_k.masked_fill(old_logprobs == -torch.inf, -torch.inf).masked_fill(~loss_mask, 0.0)
    if correction == "none":
        return CorrectionWeight(weight=torch.ones_like(log_k), is_limited=torch.zeros_like(loss_mask))
    bound = math.log(cap)
    weight = log_k.clamp(max=bound).exp()
    if correction == "tis":
        return CorrectionWeight(weight=weight, is_limited=log_k > bound)
    is_outside = log_k.abs() > bound
    return CorrectionWeight(weight=weight.masked_fill(is_outside, 0.0), is_limited=is_outside)


# KL(policy || reference) from one sampled token: three estimates of its value, one gradient.
#
# With d = log(reference(y) / policy(y)) and y drawn from the policy (Schulman, joschu.net/blog/kl-
# approx.html):
#
#     k1 = -d               unbiased, may be negative
#     k2 = d^2 / 2          biased, small variance
#     k3 = e^d - 1 - d      unbiased, never negative
#
# A good estimate of a value is not a loss whose gradient is right. With g = grad log policy(y), E[g] = 0:
#
#     grad KL = E[-d g]                           what is wanted
#     autograd of k1 = g                          0 in expectation
#     autograd of k2 = -d g                       what is wanted, sample by sample
#     autograd of k3 = (1 - e^d) g                the gradient of KL(reference || policy)
#
# (arXiv:2510.01555 derives the same; OpenRLHF PR 1314, and the k3 loss of most trainers, have the others.)
# The loss below therefore has the chosen estimate as its value and -d g as its gradient for all three, so
# that `kl_estimator` decides what is logged and added to the loss, never where training goes. -d g is also
# what the score function estimate g k + grad k gives for k3, sample by sample, and for k1 up to the
# baseline g.
#
# The KL is that of one token's distribution given its context: what a token does to the KL of later tokens
# is left out, as it is in GRPO. The samples are taken as the policy's own; after several updates on one
# rollout they are the old policy's, and the estimate is off by as much as the ratio is off 1.

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimates(log_ratio: Tensor) -> dict[KlEstimator, Tensor]:
    """Every estimate of KL(sampler || other), [T] nats, from [T] d = log(other(y) / sampler(y)), bounded."""
    return {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": torch.expm1(log_ratio) - log_ratio}


def kl_loss(log_ratio: Tensor, estimator: KlEstimator) -> Tensor:
    """[T] nats: the estimate's value with the gradient of KL(policy || reference).

    `log_ratio` is [T] d = log(reference(y) / policy(y)), bounded; differentiable in the policy.
    """
    k2 = log_ratio.square() / 2
    return kl_estimates(log_ratio.detach())[estimator] + (k2 - k2.detach())
