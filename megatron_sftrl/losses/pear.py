"""PEAR: demonstrations reweighted by how likely the policy is to reach what follows."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_sftrl.config.gates import GateSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import LossInputs, LossOptions, LossOutput
from megatron_sftrl.losses.registry import Loss, build_loss, register_loss
from megatron_sftrl.losses.sequences import Sequences

FLOOR_SHARE, CEILING_SHARE = 0.5, 0.02
"""Shares of loss tokens at the bounds of log G that are warned of: most tokens no longer train; and, at
weights of e^5 against about 1, a few of them are the whole gradient."""


class PearOptions(LossOptions):
    """Options of `pear`; the defaults are the paper's."""

    variant: Literal["token", "block", "sequence"] = "token"
    """What a token's weight covers: what follows it, what follows its block, or the whole sequence."""
    gamma: float = Field(default=0.999, gt=0, le=1)
    """Discount per remaining loss token; not used by `sequence`."""
    clip_ratio: tuple[float, float] = (-0.08, 0.3)
    """Bounds of one token's log ratio log pi(y) - log pi_b(y), nats."""
    clip_log_weight: tuple[float, float] = (-10.0, 5.0)
    """Bounds of log G, nats."""
    block_size: int = Field(default=4, ge=1)
    """Loss tokens per block, for `block`."""
    base: str = "sft"
    """The loss that is weighted: any registered name."""
    base_options: dict[str, object] = Field(default={})
    """Options of the base loss."""
    center: Literal["none", "sequence"] = "none"
    """sequence: subtract the sequence's mean log ratio before clipping. Not in the paper; for a behaviour
    policy much stronger than the policy, under which log G would sink to its floor."""
    normalize: Literal["none", "mean_one"] = "none"
    """mean_one: scale the weights to mean 1 over each sequence. Not in the paper."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> PearOptions:
        for name in ("clip_ratio", "clip_log_weight"):
            low, high = getattr(self, name)
            if not low <= high:
                raise UserError(f"{name}: expected low <= high, got ({low}, {high})")
        self.base_loss()
        return self

    def base_loss(self) -> Loss:
        """The loss that is weighted."""
        if self.base == "pear":
            raise UserError("base: expected another loss, got 'pear' itself")
        return build_loss(self.base, self.base_options)

    def extra_needs(self) -> tuple[str, ...]:
        """What the base loss needs."""
        return self.base_loss().needs

    def default_gates(self) -> tuple[GateSection, ...]:
        """Shares of log G at its bounds, beside the base loss's gates."""
        return (
            *self.base_loss().config.default_gates(),
            GateSection(metric="pear/log_weight_at_floor", above=FLOOR_SHARE),
            GateSection(metric="pear/log_weight_at_ceiling", above=CEILING_SHARE),
        )


@register_loss("pear", config=PearOptions, needs=("behavior_logprobs",))
def pear(inputs: LossInputs, config: PearOptions) -> LossOutput:
    """L_t = sg(G_t) l_t, l the base loss and G_t = exp(clip(log G_t)) the importance weight of the future.

        delta_t = clip(sg(log pi(y_t)) - b_t)
        token:     log G_t = (N - t) log gamma + sum_{j > t} delta_j
        block:     log G_t = (N - e_k) log gamma + sum_{j > e_k} delta_j,   e_k the last position of t's block
        sequence:  log G_t = sum_j delta_j

    (arXiv:2602.01058, section 3, Alg. 1.) t = 1..N counts the loss tokens of a sequence; b is
    behavior_logprobs. Metrics are token means; minimum, maximum and effective sample size are taken per
    sequence first: `pear/effective_sample_fraction` is (sum G)^2 / (N sum G^2) of the token's sequence.

    Two hazards, both warned of (`default_gates`). Upwards: a policy that overtakes the writer on its own data
    has delta > 0 nearly everywhere and log G runs to its ceiling: in one such run the gradient norm rose from
    9 to 1006 in four steps. Downwards: under a much stronger writer delta sits at its lower bound, log G at
    its floor, and only the last tokens of each sequence still train. A public reproduction of that case (a 7B
    policy on data of a 32B writer, 189 steps) saw held-out losses of 0.552 unweighted, 0.536 as published and
    0.569 with `center`, at gradient norms of 2.3, 4.6 and 3.5, and stayed unweighted. Scores must come from
    the dtype that trains: other rounding alone moves log G by nats.
    """
    base = config.base_loss()(inputs)
    assert inputs.batch.behavior_logprobs is not None
    sequences = inputs.sequences
    ratio = inputs.policy.logprobs(inputs.batch.labels).detach() - inputs.batch.behavior_logprobs
    if config.center == "sequence":
        ratio = ratio - sequences.mean(ratio)
    delta = ratio.clamp(*config.clip_ratio)
    raw = _log_weight(delta, sequences, config)
    log_weight = raw.clamp(*config.clip_log_weight)
    weight = log_weight.exp()
    if config.normalize == "mean_one":
        weight = weight / sequences.mean(weight).clamp(min=torch.finfo(weight.dtype).tiny)
    metrics = _metrics(ratio, raw, log_weight, weight, sequences, config)
    return LossOutput(token_loss=weight * base.token_loss, metrics={**base.metrics, **metrics})


def _log_weight(delta: Tensor, sequences: Sequences, config: PearOptions) -> Tensor:
    """[T] log G before clipping, nats."""
    if config.variant == "sequence":
        return sequences.sum(delta)
    block_size = 1 if config.variant == "token" else config.block_size
    block_end = (sequences.index() // block_size + 1) * block_size
    num_after = (sequences.count() - block_end).clamp(min=0)
    return num_after.to(delta.dtype) * math.log(config.gamma) + sequences.suffix_sum(delta, block_size)


def _metrics(
    ratio: Tensor,
    raw: Tensor,
    log_weight: Tensor,
    weight: Tensor,
    sequences: Sequences,
    config: PearOptions,
) -> dict[str, Tensor]:
    sum_of_squares = sequences.sum(weight * weight)
    tiny = torch.finfo(weight.dtype).tiny
    effective = sequences.sum(weight) ** 2 / (sequences.count().clamp(min=1) * sum_of_squares.clamp(min=tiny))
    return {
        "pear/log_weight": log_weight,
        "pear/log_weight_sequence_min": sequences.minimum(log_weight),
        "pear/log_weight_sequence_max": sequences.maximum(log_weight),
        "pear/ratio_at_low_clip": (ratio <= config.clip_ratio[0]).to(weight.dtype),
        "pear/ratio_at_high_clip": (ratio >= config.clip_ratio[1]).to(weight.dtype),
        "pear/log_weight_at_floor": (raw <= config.clip_log_weight[0]).to(weight.dtype),
        "pear/log_weight_at_ceiling": (raw >= config.clip_log_weight[1]).to(weight.dtype),
        "pear/effective_sample_fraction": effective,
    }
