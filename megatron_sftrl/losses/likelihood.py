"""Losses on the demonstration and the policy alone.

Supervised fine-tuning (sft), a bonus for entropy, labels mixed with the uniform distribution; the likelihood
weighted by what the policy thinks of the label (dft, chord_phi, idft, trsft, aesl) or of the place (eaft);
and pushing against the policy's own other choices (sed, gem).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator

from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import register_loss
from megatron_sftrl.vocab_parallel import SmoothedLabels


@register_loss("sft", token_local=True)
def sft(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """L_t = -log pi(y_t)."""
    return LossOutput(token_loss=-inputs.policy.logprobs(inputs.batch.labels))


@register_loss("dft", token_local=True)
def dft(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """L_t = -sg(pi(y_t)) log pi(y_t)   (arXiv:2508.05629)."""
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    probs = logprobs.detach().exp()
    return LossOutput(token_loss=-probs * logprobs, metrics={"dft/label_prob": probs})


@register_loss("chord_phi", token_local=True)
def chord_phi(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """L_t = -sg(phi_t) log pi(y_t), phi_t = pi(y_t) (1 - pi(y_t)): most at 1/2, nothing where pi is sure.

    (arXiv:2508.11408, the SFT term of CHORD-phi, with phi a constant for the gradient as in its release;
    there it stands beside GRPO, here under `sft.loss`, or alone.)
    """
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    fixed = logprobs.detach()
    phi = -fixed.exp() * torch.expm1(fixed)
    return LossOutput(token_loss=-phi * logprobs, metrics={"chord/phi": phi})


class EntropyOptions(LossOptions):
    """Options of `entropy`."""

    coef: float = 0.1
    """c, nats of loss per nat of entropy; positive keeps the policy diverse."""


@register_loss("entropy", config=EntropyOptions, token_local=True)
def entropy(inputs: LossInputs, config: EntropyOptions) -> LossOutput:
    """L_t = -log pi(y_t) - c H(pi_t)."""
    policy = inputs.policy
    return LossOutput(token_loss=-policy.logprobs(inputs.batch.labels) - config.coef * policy.entropy())


class LabelSmoothingOptions(LossOptions):
    """Options of `label_smoothing`."""

    smoothing: float = Field(default=0.1, ge=0, le=1)
    """s, share of the uniform distribution in the target."""


@register_loss("label_smoothing", config=LabelSmoothingOptions, token_local=True)
def label_smoothing(inputs: LossInputs, config: LabelSmoothingOptions) -> LossOutput:
    """L_t = -(1 - s) log pi(y_t) - s mean_v log pi(v)   (arXiv:1512.00567; V counts no padding)."""
    target = SmoothedLabels(labels=inputs.batch.labels, smoothing=config.smoothing)
    return LossOutput(token_loss=inputs.policy.cross_entropy(target))


class IdftOptions(LossOptions):
    """Options of `idft`."""

    lam: float = Field(default=1.0, ge=0, le=1)
    """lambda: 0 is dft, 1 the full exponent. The paper has 0 in a warm-up and then a ramp to 1; a loss does
    not know the step, so here it is one number for the whole run."""
    beta: float = Field(default=1.0, gt=0)
    """b, nats of phi over which the exponent changes by a factor of e."""
    gamma_min: float = Field(default=0.1, ge=0)
    """Smallest exponent, of labels that are likelier than the policy's own samples would be."""
    gamma_max: float = Field(default=2.0, ge=0)
    """Largest exponent, of labels that are less likely."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> IdftOptions:
        if self.gamma_min > self.gamma_max:
            raise UserError(f"gamma_min {self.gamma_min} is above gamma_max {self.gamma_max}")
        return self


@register_loss("idft", config=IdftOptions, token_local=True)
def idft(inputs: LossInputs, config: IdftOptions) -> LossOutput:
    """L_t = -sg(pi(y_t)^g_t) lp_t, g_t = 1 + lambda (clip(exp(-phi_t / b), gamma_min, gamma_max) - 1).

    (arXiv:2602.12222.) phi_t = lp_t + H(pi_t), lp = log pi(y): above 0 where the label is likelier than the
    policy's own samples are on average. The paper's later version also has a sigmoid weight, not this one.
    """
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    fixed = logprobs.detach()
    phi = fixed + inputs.policy.entropy().detach()
    bounded = torch.exp(-phi / config.beta).clamp(config.gamma_min, config.gamma_max)
    gamma = 1.0 + config.lam * (bounded - 1.0)
    weight = (gamma * fixed).exp()
    return LossOutput(
        token_loss=-weight * logprobs,
        metrics={"idft/weight": weight, "idft/gamma": gamma, "idft/phi": phi},
    )


class EaftOptions(LossOptions):
    """Options of `eaft`."""

    top_k: int = Field(default=20, ge=2)
    """K, the policy's largest logits that the entropy is taken on."""


@register_loss("eaft", config=EaftOptions, token_local=True)
def eaft(inputs: LossInputs, config: EaftOptions) -> LossOutput:
    """L_t = -sg(H_K / ln K) log pi(y_t), H_K the entropy of the policy's K most likely tokens, renormalised.

    (arXiv:2601.02151.) `eaft/weight` is H_K / ln K: 0 where the policy is sure, whether right or not, 1 where
    its K tokens are alike. A vocabulary below K counts as K.
    """
    top = inputs.policy.detach().top_k(config.top_k)
    weight = top.entropy(1.0) / math.log(min(config.top_k, inputs.policy.vocab_size))
    token_loss = -weight * inputs.policy.logprobs(inputs.batch.labels)
    return LossOutput(token_loss=token_loss, metrics={"eaft/weight": weight})


class SedOptions(LossOptions):
    """Options of `sed`."""

    tau: float = Field(gt=0, le=1)
    """Top-k mass below which a place counts as open. The paper's is the 0.3-quantile over the training data
    under the model that training starts from: the tau at which the first step's `sed/open_share` is 0.3."""
    lam: float = Field(default=1.0, ge=0)
    """lambda, weight of the diversity term; 0 is sft."""
    top_k: int = Field(default=2, ge=1)
    """k, the policy's most likely tokens whose mass is compared with tau."""


@register_loss("sed", config=SedOptions, token_local=True)
def sed(inputs: LossInputs, config: SedOptions) -> LossOutput:
    """L_t = -log pi(y_t) + lambda M_t (pi(y_t) - 1/2)^2, M_t = 1 where the top k tokens' mass is below tau.

    (arXiv:2602.07464.) M, without gradient, is taken under the policy as it is now. `sed/open_share` is the
    share of tokens with M = 1, `sed/top_mass` the mass.
    """
    mass = inputs.policy.detach().top_k(config.top_k).mass()
    is_open = (mass < config.tau).to(mass.dtype)
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    token_loss = -logprobs + config.lam * is_open * (logprobs.exp() - 0.5) ** 2
    return LossOutput(token_loss=token_loss, metrics={"sed/open_share": is_open, "sed/top_mass": mass})


class TrsftOptions(LossOptions):
    """Options of `trsft`."""

    alpha: float = Field(default=0.1, gt=0, le=1)
    """a, the label's probability down to which the gradient is that of sft; 1 has dft's gradient."""


@register_loss("trsft", config=TrsftOptions, token_local=True)
def trsft(inputs: LossInputs, config: TrsftOptions) -> LossOutput:
    """L_t = -pi(y_t) / max(sg(pi(y_t)), a): the gradient of sft, times pi(y_t) / a where pi(y_t) < a.

    (arXiv:2512.17636, the loss on expert tokens alone.) No nats: -1 for every token above a, so watch `nll`.
    `trsft/outside_share` is the share of tokens below a.
    """
    probs = inputs.policy.logprobs(inputs.batch.labels).exp()
    fixed = probs.detach()
    is_outside = (fixed < config.alpha).to(fixed.dtype)
    return LossOutput(
        token_loss=-probs / fixed.clamp(min=config.alpha), metrics={"trsft/outside_share": is_outside}
    )


class GemOptions(LossOptions):
    """Options of `gem`."""

    beta: float = Field(default=0.7, gt=0)
    """b, the temperature of q; towards 0 only the policy's favourite is pushed down, 1 is sft's gradient."""


@register_loss("gem", config=GemOptions, token_local=True)
def gem(inputs: LossInputs, config: GemOptions) -> LossOutput:
    """L_t = -sum_v q_v (log pi(y_t) - log pi(v)), q = sg(softmax(z / b)); its gradient is q - onehot(y_t).

    (arXiv:2408.16673 with the linear h; the release's log-sigmoid variant is not this one.) Below b = 1 the
    label is learned at the cost of what the policy prefers, and its unlikely tokens keep their probability:
    the run's `entropy` shows it.
    """
    policy = inputs.policy
    expected = policy.cross_entropy(policy.detach().tempered(config.beta))
    return LossOutput(token_loss=-policy.logprobs(inputs.batch.labels) - expected)


class AeslOptions(LossOptions):
    """Options of `aesl`."""

    tau: float = Field(gt=0)
    """Temperature of the weight per nat of the prefix's mean negative log-likelihood. No published default is
    known: choose it by `aesl/weight`, which falls as tokens are mastered, earlier for a small tau."""


SMALLEST_TEMPERATURE = 1e-6
"""Of the weight of `aesl`, where all of the prefix is certain: the softmax is that of the largest logit."""


@register_loss("aesl", config=AeslOptions)
def aesl(inputs: LossInputs, config: AeslOptions) -> LossOutput:
    """L_t = -sg(w_t) lp_t, w_t = 1 - softmax(z_t / T_t)[y_t], T_t = -tau (1/t) sum_{i <= t} lp_i.

    (ICLR 2026, openreview.net/forum?id=yezWGJmODg.) lp is log pi(y); t counts the loss tokens of the
    sequence. A token that the policy has mastered is learned no more, the sooner the likelier its prefix is.
    T_t is read as a temperature, from accounts of the paper: a number per token subtracted from all of z
    would change nothing. That w is a constant for the gradient is read into it, too.
    """
    logprobs = inputs.policy.logprobs(inputs.batch.labels)
    temperature = config.tau * inputs.sequences.prefix_mean(-logprobs.detach())
    temperature = temperature.clamp(min=SMALLEST_TEMPERATURE)
    sharpened = inputs.policy.detach().tempered(temperature)
    weight = -torch.expm1(sharpened.logprobs(inputs.batch.labels))
    return LossOutput(
        token_loss=-weight * logprobs, metrics={"aesl/weight": weight, "aesl/temperature": temperature}
    )
