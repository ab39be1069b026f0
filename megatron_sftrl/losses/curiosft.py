"""CurioSFT: likelihood plus distillation from a hotter copy of the policy itself that follows it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import register_loss
from megatron_sftrl.vocab_parallel import TopLogits, logprobs_together

# The released entropy target H* = H(1) + 0.5 sigmoid(2 (H(1) - pivot)) and its 20 rounds of bisection.
MAX_ENTROPY_GAIN = 0.5
GAIN_SLOPE = 2.0
BISECTION_ROUNDS = 20


class CurioSftOptions(LossOptions):
    """Options of `curiosft`; the defaults are the release's."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the distillation term."""
    tau_min: float = Field(default=1.1, gt=0)
    """Lowest teacher temperature; also that of factual tokens, and of all when temperature is fixed."""
    tau_max: float = Field(default=1.5, gt=0)
    """Highest teacher temperature."""
    pivot: float = 1.2
    """Teacher entropy, nats, at which half of the largest entropy gain (0.5 nats) is asked for."""
    top_k: int = Field(default=512, ge=1)
    """Teacher logits on which the temperature is solved for."""
    factual_entropy: float = Field(default=0.03, ge=0)
    """Teacher entropy, nats, up to which a token counts as factual."""
    divergence: Literal["k2", "forward_kl", "reverse_kl"] = "k2"
    """k2: half the squared log ratio at the label, as released. forward_kl: KL(teacher || policy) and
    reverse_kl: KL(policy || teacher) over the whole vocabulary; not in the release."""
    temperature: Literal["entropy_guided", "fixed"] = "entropy_guided"
    """entropy_guided: solved per token. fixed: tau_min for every token (the paper's ablation)."""

    @model_validator(mode="after")
    def _temperatures_are_ordered(self) -> CurioSftOptions:
        if self.tau_min > self.tau_max:
            raise UserError(f"tau_min {self.tau_min} is above tau_max {self.tau_max}")
        return self


@register_loss("curiosft", config=CurioSftOptions, needs=("reference",), token_local=True)
def curiosft(inputs: LossInputs, config: CurioSftOptions) -> LossOutput:
    """L_t = -lp_t + alpha D_t, D_t = 1/2 (lp_t - sg(log softmax(u / tau_t)[y_t]))^2, lp = log pi(y).

    (arXiv:2602.02244 and its release; u are the logits of the moving-average teacher.) The square is
    differentiated as it stands: d L_t / d lp_t = -1 + alpha (lp_t - lt_t). tau_t makes the teacher's entropy
    H(tau_t) equal to H(1) + 0.5 sigmoid(2 (H(1) - pivot)); see `solve_temperature`. The policy's entropy is
    logged for every loss.
    """
    assert inputs.reference is not None
    policy, labels, teacher = inputs.policy, inputs.batch.labels, inputs.reference.detach()
    is_guided = config.temperature == "entropy_guided"
    top = teacher.top_k(config.top_k if is_guided else 1)  # the teacher's entropy travels with it
    entropy = teacher.entropy()
    tau = solve_temperature(top, entropy, config) if is_guided else torch.full_like(entropy, config.tau_min)
    soft_teacher = teacher.tempered(tau)
    if config.divergence == "k2":
        logprobs, teacher_logprobs = logprobs_together([policy, soft_teacher], labels)
        divergence = 0.5 * (logprobs - teacher_logprobs) ** 2
    else:
        kl = policy.kl_from if config.divergence == "forward_kl" else policy.kl_to
        divergence = kl(soft_teacher)
        logprobs = policy.logprobs(labels)  # came along with the divergence
    metrics = {
        "curiosft/teacher_entropy": entropy,
        "curiosft/tau": tau,
        f"curiosft/{config.divergence}": divergence.detach(),
    }
    return LossOutput(token_loss=-logprobs + config.alpha * divergence, metrics=metrics)


def solve_temperature(top: TopLogits, full_entropy: Tensor, config: CurioSftOptions) -> Tensor:
    """[T] temperatures at which the teacher has the entropy that is asked of it.

        H(tau_t) = H(1) + 0.5 sigmoid(2 (H(1) - pivot)) in [tau_min, tau_max], H the entropy of softmax(u_top
        / tau); clamped at the ends; tau_min where the full-vocabulary entropy is at most `factual_entropy`.

    `full_entropy` is [T] nats, over the whole vocabulary.
    """
    plain = top.entropy(1.0)
    goal = plain + MAX_ENTROPY_GAIN * torch.sigmoid(GAIN_SLOPE * (plain - config.pivot))
    low, high = torch.full_like(plain, config.tau_min), torch.full_like(plain, config.tau_max)
    is_too_hot = top.entropy(low) >= goal  # tau_min already exceeds the goal
    is_too_cold = top.entropy(high) <= goal  # tau_max does not reach it
    for _ in range(BISECTION_ROUNDS):
        middle = 0.5 * (low + high)
        is_below = top.entropy(middle) < goal
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    tau = 0.5 * (low + high)
    tau = tau.masked_fill(is_too_cold, config.tau_max)
    is_factual = full_entropy <= config.factual_entropy
    return tau.masked_fill(is_too_hot | is_factual, config.tau_min)
