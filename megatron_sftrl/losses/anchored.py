"""Losses that hold the policy to a reference, or weigh demonstrations by it.

A divergence from the start (asft), a teacher's distribution (kd), a bound on the ratio to an earlier policy
(psft), and sequences weighted by how much likelier they have become (iw_sft).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.policy_ratio import log_ratio
from megatron_sftrl.losses.registry import register_loss
from megatron_sftrl.vocab_parallel import TokenDistribution, TopLogits, logprobs_together


class AsftOptions(LossOptions):
    """Options of `asft`."""

    kl_weight: float = Field(default=0.1, ge=0)
    """w, nats of loss per nat of divergence; 0 is dft. 0.1 is the release's."""


@register_loss("asft", config=AsftOptions, needs=("reference",), token_local=True)
def asft(inputs: LossInputs, config: AsftOptions) -> LossOutput:
    """L_t = -sg(pi(y_t)) log pi(y_t) + w KL(q_t || pi_t)   (arXiv:2509.23753).

    q is the model that training starts from (`kind: frozen`). The direction is that of the release, over the
    whole vocabulary.
    """
    assert inputs.reference is not None
    divergence = inputs.policy.kl_from(inputs.reference)
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    probs = logprobs.detach().exp()
    return LossOutput(
        token_loss=-probs * logprobs + config.kl_weight * divergence,
        metrics={"asft/label_prob": probs, "asft/kl": divergence.detach()},
    )


class KdOptions(LossOptions):
    """Options of `kd`."""

    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || policy), which covers what the teacher does. reverse: KL(policy || teacher),
    which seeks its modes."""
    temperature: float = Field(default=1.0, gt=0)
    """T of both distributions. The divergence is multiplied by T^2, so that its gradient keeps its size."""
    top_k: int | None = Field(default=None, ge=2, le=256)
    """Compare on the teacher's k most likely tokens alone, both distributions renormalised there; the whole
    vocabulary when not given. Whatever the policy puts elsewhere costs nothing."""
    alpha: float = Field(default=0.0, ge=0, le=1)
    """Share of the demonstration's likelihood in the loss; 1 is sft."""


@register_loss("kd", config=KdOptions, needs=("reference",), token_local=True)
def kd(inputs: LossInputs, config: KdOptions) -> LossOutput:
    """L_t = (1 - alpha) T^2 D_t - alpha log pi(y_t), D_t = KL(q_t || pi_t) or KL(pi_t || q_t), both at T.

    (arXiv:1503.02531; reverse: arXiv:2306.08543, here on demonstrations.) q is a teacher of the policy's
    shape and vocabulary: a frozen reference with weights of its own, `reference.checkpoint`. `kd/kl` is D_t,
    without T^2; with top_k `kd/teacher_mass` is what the teacher gives its k tokens at T.
    """
    assert inputs.reference is not None
    policy, teacher = (_at(each, config.temperature) for each in (inputs.policy, inputs.reference.detach()))
    metrics = {}
    if config.top_k is None:
        divergence = policy.kl_from(teacher) if config.direction == "forward" else policy.kl_to(teacher)
    else:
        top = teacher.top_k(config.top_k, with_ids=True)
        divergence = _kl_on_top(policy, top, config.direction)
        metrics["kd/teacher_mass"] = top.mass()
    metrics["kd/kl"] = divergence.detach()
    token_loss = (1.0 - config.alpha) * config.temperature**2 * divergence
    if config.alpha > 0:
        token_loss = token_loss - config.alpha * inputs.policy.logprobs(inputs.batch.labels)
    return LossOutput(token_loss=token_loss, metrics=metrics)


def _at(distribution: TokenDistribution, temperature: float) -> TokenDistribution:
    """At another temperature; at 1 itself, with the answers that it remembers."""
    return distribution if temperature == 1.0 else distribution.tempered(temperature)


def _kl_on_top(policy: TokenDistribution, top: TopLogits, direction: str) -> Tensor:
    """[T] nats, the divergence on the teacher's top ids, both sides renormalised."""
    assert top.ids is not None
    log_q = torch.log_softmax(top.values, dim=1)
    log_p = torch.log_softmax(policy.logprobs_of_each(top.ids), dim=1)
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    return (first.exp() * (first - second)).sum(dim=1)


class PsftOptions(LossOptions):
    """Options of `psft`."""

    clip_high: float = Field(default=0.28, gt=0)
    """eps: once the label is 1 + eps times as likely as under the old policy, it is pushed no further. The
    lower bound, 0.8 in the paper, never acts where the advantage is 1, and is no option."""


@register_loss("psft", config=PsftOptions, needs=("reference",), token_local=True)
def psft(inputs: LossInputs, config: PsftOptions) -> LossOutput:
    """L_t = -min(rho_t, clip(rho_t, 0.8, 1 + eps)) = -min(rho_t, 1 + eps), rho_t = pi(y_t) / pi_old(y_t).

    (arXiv:2508.17784: the clipped objective of PPO with all advantages 1; no nats but a ratio, -1 right after
    a synchronisation.) pi_old is the reference. In the paper it is the policy at the start of each outer
    batch, N updates long: `reference: {kind: moving_average, decay: 0.0, sync_every: N}`. A frozen reference
    bounds the whole run instead. Log ratios are bounded at 20 nats.
    """
    assert inputs.reference is not None
    logprobs, old = logprobs_together([inputs.policy, inputs.reference.detach()], inputs.batch.labels)
    ratio = log_ratio(logprobs, old, inputs.batch.loss_mask).exp()
    bound = 1.0 + config.clip_high
    fixed = ratio.detach()
    return LossOutput(
        token_loss=-ratio.clamp(max=bound),
        metrics={"psft/ratio": fixed, "psft/clipped_share": (fixed > bound).to(fixed.dtype)},
    )


class IwSftOptions(LossOptions):
    """Options of `iw_sft`; the defaults are what the release executes."""

    tau: float = Field(default=1.0, ge=0)
    """Exponent of the mean ratio; 0 is sft."""
    max_weight: float = Field(default=16.0, gt=0)
    """Largest weight of a sequence."""


@register_loss("iw_sft", config=IwSftOptions, needs=("reference",))
def iw_sft(inputs: LossInputs, config: IwSftOptions) -> LossOutput:
    """L_t = -sg(w) lp_t, w = min(exp(tau mean_t(lp_t - log q(y_t))), max_weight) of the whole sequence.

    (arXiv:2507.12856, as its release executes it: with the mean over the sequence's loss tokens, where the
    ratio of two sequences has the sum.) lp is log pi(y); q is the model that training starts from (`kind:
    frozen`), so that w is 1 at first. A weight that grows with the likelihood it trains feeds itself: watch
    `iw_sft/weight`.
    """
    assert inputs.reference is not None
    logprobs, base = logprobs_together([inputs.policy, inputs.reference.detach()], inputs.batch.labels)
    log_weight = config.tau * inputs.sequences.mean((logprobs - base).detach())
    bound = math.log(config.max_weight)
    weight = log_weight.clamp(max=bound).exp()
    return LossOutput(
        token_loss=-weight * logprobs,
        metrics={
            "iw_sft/weight": weight,
            "iw_sft/capped_share": (log_weight > bound).to(weight.dtype),
        },
    )
