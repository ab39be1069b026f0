"""GRPO and its family: policy gradients on sampled responses with a bounded importance ratio."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.policy_ratio import (
    Correction,
    CorrectionWeight,
    KlEstimator,
    correction_weight,
    kl_estimates,
    kl_loss,
    log_ratio,
    sequence_log_ratio,
)
from megatron_sftrl.losses.registry import register_loss
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel.distribution import TokenDistribution, logprobs_together


class GrpoOptions(LossOptions):
    """Options of `grpo`; the defaults are the paper's without its KL term."""

    temperature: float = Field(default=1.0, gt=0)
    """T, the temperature that the responses were sampled at: policy, reference and entropy are taken at it.
    The trainer fills it in from rollout.temperature."""
    ratio: Literal["token", "sequence"] = "token"
    """token: pi(y_t) / pi_old(y_t). sequence: the geometric mean over the response's tokens (GSPO); clip
    ranges are then near 3e-4."""
    objective: Literal["clip", "cispo"] = "clip"
    """clip: PPO's pessimistic bound. cispo: the clipped ratio as a constant weight of the log-probability, so
    that every token keeps a gradient."""
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """The ratio counts down to 1 - clip_low; 1 leaves it without a lower bound."""
    clip_high: float | None = Field(default=0.2, ge=0)
    """The ratio counts up to 1 + clip_high; DAPO's clip-higher is 0.28; null leaves it without an upper
    bound."""
    dual_clip: float | None = Field(default=None, gt=1)
    """c: where the advantage is negative the loss is at most c |A|; 3 is usual. For objective clip."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Nats of loss per nat of KL(policy || reference); 0 needs no reference."""
    kl_estimator: KlEstimator = "k3"
    """Whose value the KL term shows; its gradient is that of the KL for all three."""
    correction: Correction = "none"
    """Weight for samples whose engine disagrees with the trainer, k = exp(old - rollout): tis takes
    min(k, correction_cap), icepop drops tokens outside [1 / correction_cap, correction_cap]."""
    correction_cap: float = Field(default=2.0, gt=1)
    """C, largest k."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Nats of loss taken off per nat of entropy."""
    shaping: float | None = Field(default=0.1, gt=0)
    """gamma: a demonstration in a group (rollout.demonstrations) counts with pi / (pi + gamma) at each token,
    unclipped (LUFFY); null: with pi. The smaller gamma is, the more an unlikely token of it is learned."""

    @model_validator(mode="after")
    def _nothing_is_written_in_vain(self) -> GrpoOptions:
        if self.dual_clip is not None and self.objective != "clip":
            raise UserError(f"dual_clip belongs to objective clip, got {self.objective}: remove dual_clip")
        written = self.model_fields_set
        if "kl_estimator" in written and self.kl_coefficient == 0:
            raise UserError("kl_estimator has no effect while kl_coefficient is 0: set one, remove the other")
        if "correction_cap" in written and self.correction == "none":
            raise UserError("correction_cap has no effect while correction is none: set tis or icepop")
        return self

    def extra_needs(self) -> tuple[str, ...]:
        """The reference for a KL term, the engine's log-probabilities for a correction."""
        reference = ("reference",) if self.kl_coefficient > 0 else ()
        return reference + (("rollout_logprobs",) if self.correction != "none" else ())


@register_loss(
    "grpo",
    config=GrpoOptions,
    needs=("advantages", "old_logprobs"),
    token_local=lambda config: config.ratio == "token",
)
def grpo(inputs: LossInputs, config: GrpoOptions) -> LossOutput:
    """L_t = w_t l_t + c_KL KL_t - c_H H_t, with rho_t = exp(lp_t - old_t) or its mean over the sequence.

        clip:    l_t = -min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t)      (arXiv:2402.03300)
                 dual clip, where A_t < 0: l_t = min(l_t, -c A_t)                       (arXiv:1912.09729)
        cispo:   l_t = -sg(clip(rho_t, 1 - eps_low, 1 + eps_high)) A_t lp_t             (arXiv:2506.13585)

    w is the rollout correction (policy_ratio), KL_t that of kl_estimator; sequence ratios are
    arXiv:2507.18071. Dual clip bounds the objective from below, max(., c A), hence the loss from above. The
    paper's 1/|o| and Dr. GRPO's constant length are ways to fill token_weight, not part of this function.

    Tokens of a demonstration in the group (batch.is_demonstration) have, whatever ratio and objective are,

        l_t = -f(pi(y_t)) A_t,    f(x) = x / (x + gamma), or x                       (arXiv:2504.14945)

    which is the ratio to a policy that wrote them with probability 1, as LUFFY and its release take it, with
    their policy shaping and no clip. The entropy term is theirs, too; w and the KL term, which are about
    samples of the policy, are not.

    Log ratios are bounded at 20 nats. Metrics: `grpo/clip_low` and `grpo/clip_high` are the tokens that the
    lower and upper bound acted on (under clip the lower bound acts on negative advantages only, the upper on
    positive); `grpo/kl_old_*` estimates KL(old || policy), `grpo/kl_reference_*` KL(policy || reference);
    `entropy` and `nll` are those of the distribution that is sampled from, at the temperature. Where there
    are demonstrations, `grpo/demonstration_share` is theirs of the weight; the averages of their pi
    (`grpo/demonstration_ratio`) and f(pi) (`grpo/demonstration_shaped`) are over all tokens, 0 on others, and
    the metrics above count them as tokens that have not moved.
    """
    batch = inputs.batch
    assert batch.advantages is not None and batch.old_logprobs is not None
    policy = _at_temperature(inputs.policy, config.temperature)
    policy.anticipate(batch.labels)
    distributions = [policy]
    if config.kl_coefficient > 0:
        assert inputs.reference is not None
        distributions.append(_at_temperature(inputs.reference.detach(), config.temperature))
    logprobs, *reference_logprobs = logprobs_together(distributions, batch.labels)
    logprobs = torch.where(batch.loss_mask, logprobs, 0.0)  # a masked label may be impossible: 0 * -inf

    sampled = batch.loss_mask if batch.is_demonstration is None else batch.loss_mask & ~batch.is_demonstration
    moved = log_ratio(logprobs, batch.old_logprobs, sampled)
    ratio = (sequence_log_ratio(moved, inputs.sequences) if config.ratio == "sequence" else moved).exp()
    advantages = torch.where(batch.loss_mask, batch.advantages, 0.0).to(ratio.dtype)
    token_loss = _policy_loss(logprobs, ratio, advantages, config)
    entropy = policy.entropy()
    metrics = {"entropy": entropy.detach(), "nll": -logprobs.detach(), "grpo/ratio": ratio.detach()}
    metrics |= _clip_metrics(ratio.detach(), advantages, config)
    metrics |= {f"grpo/kl_old_{name}": value for name, value in kl_estimates(moved.detach()).items()}

    if batch.rollout_logprobs is not None:
        correction = correction_weight(
            batch.old_logprobs,
            batch.rollout_logprobs,
            sampled,
            config.correction,
            config.correction_cap,
        )
        token_loss = correction.weight.to(ratio.dtype) * token_loss
        metrics |= _correction_metrics(correction, batch, sampled, ratio.dtype)
    if batch.is_demonstration is not None:
        shaped = _shaped(logprobs, config.shaping)
        token_loss = torch.where(batch.is_demonstration, -shaped * advantages, token_loss)
        metrics |= _demonstration_metrics(logprobs.detach(), shaped.detach(), batch.is_demonstration)
    for reference in reference_logprobs:
        apart = log_ratio(reference, logprobs, sampled)
        token_loss = token_loss + config.kl_coefficient * kl_loss(apart, config.kl_estimator)
        estimates = kl_estimates(apart.detach())
        metrics |= {f"grpo/kl_reference_{name}": value for name, value in estimates.items()}
    if config.entropy_coefficient > 0:
        token_loss = token_loss - config.entropy_coefficient * entropy
    return LossOutput(token_loss=token_loss, metrics=metrics)


OF_DEMONSTRATIONS = ("grpo/demonstration_ratio", "grpo/demonstration_shaped")
"""Metrics that are 0 on other tokens: over grpo/demonstration_share they are averages over demonstrations."""


def _at_temperature(distribution: TokenDistribution, temperature: float) -> TokenDistribution:
    """The distribution itself at 1, so that what it answers is remembered for the metrics of every loss."""
    return distribution if temperature == 1.0 else distribution.tempered(temperature)


def _policy_loss(logprobs: Tensor, ratio: Tensor, advantages: Tensor, config: GrpoOptions) -> Tensor:
    """[T] l_t, before correction."""
    clipped = ratio.clamp(1.0 - config.clip_low, _upper_bound(config))
    if config.objective == "cispo":
        return -(clipped.detach() * advantages) * logprobs
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if config.dual_clip is not None:
        # Where A >= 0 the loss is at most 0 already.
        loss = torch.minimum(loss, config.dual_clip * advantages.abs())
    return loss


def _shaped(logprobs: Tensor, gamma: float | None) -> Tensor:
    """[T] f(pi), as a sigmoid: no quotient of numbers that are both near 0."""
    return logprobs.exp() if gamma is None else torch.sigmoid(logprobs - math.log(gamma))


def _demonstration_metrics(logprobs: Tensor, shaped: Tensor, is_demonstration: Tensor) -> dict[str, Tensor]:
    share = is_demonstration.to(logprobs.dtype)
    return {
        "grpo/demonstration_share": share,
        "grpo/demonstration_ratio": share * logprobs.exp(),
        "grpo/demonstration_shaped": share * shaped,
    }


def _upper_bound(config: GrpoOptions) -> float:
    """Largest ratio that counts."""
    return math.inf if config.clip_high is None else 1.0 + config.clip_high


def _clip_metrics(ratio: Tensor, advantages: Tensor, config: GrpoOptions) -> dict[str, Tensor]:
    """Which tokens a bound acted on: under clip a bound acts only where it lowers the objective."""
    is_low, is_high = ratio < 1.0 - config.clip_low, ratio > _upper_bound(config)
    metrics: dict[str, Tensor] = {}
    if config.objective == "clip":
        is_low, is_high = is_low & (advantages < 0), is_high & (advantages > 0)
    if config.dual_clip is not None:
        metrics["grpo/clip_dual"] = ((ratio > config.dual_clip) & (advantages < 0)).to(ratio.dtype)
    return {
        "grpo/clip_low": is_low.to(ratio.dtype),
        "grpo/clip_high": is_high.to(ratio.dtype),
        **metrics,
    }


def _correction_metrics(
    correction: CorrectionWeight, batch: TokenBatch, sampled: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    assert batch.old_logprobs is not None and batch.rollout_logprobs is not None
    difference = (batch.old_logprobs - batch.rollout_logprobs).abs().nan_to_num(torch.inf, torch.inf)
    difference = torch.where(sampled, difference, 0.0)
    return {
        "grpo/correction_weight": correction.weight.to(dtype),
        "grpo/correction_limited": correction.is_limited.to(dtype),
        "grpo/rollout_difference": difference.to(dtype),
    }
