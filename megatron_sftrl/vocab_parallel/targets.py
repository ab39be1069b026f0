"""Targets of a cross-entropy, described by [T] weights so that no [T, V] target is ever built.

A target is, token by token, a mixture of three distributions: the label, a reference model, the uniform one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError

if TYPE_CHECKING:
    from megatron_sftrl.vocab_parallel.distribution import TokenDistribution


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureWeights:
    """Non-negative [T] weights that sum to 1 at every token."""

    label: Tensor
    reference: Tensor
    uniform: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TiltedTarget:
    """softmax(log p~ + beta 1[v = y]) with p~(v) = (1 - smoothing) q(v) + smoothing / V + eps.

    That softmax is the mixture w onehot(y) + (1 - w) p~ / sum(p~), w = g p~(y) / (sum(p~) + g p~(y)), g =
    e^beta - 1. Made by `TokenDistribution.tilted`.
    """

    labels: Tensor
    reference: TokenDistribution
    beta: float
    smoothing: float
    eps: float

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and 0 <= self.smoothing <= 1 and self.eps >= 0):
            raise UserError(
                "tilted target: expected beta >= 0, 0 <= smoothing <= 1 and eps >= 0, "
                f"got beta={self.beta}, smoothing={self.smoothing}, eps={self.eps}"
            )

    @property
    def has_uniform(self) -> bool:
        """The uniform distribution takes part."""
        return self.smoothing > 0 or self.eps > 0

    def label_weight(self) -> Tensor:
        """[T] w, the label's weight, detached; costs nothing after a cross_entropy with this target."""
        return self.weights(self.reference.logprobs(self.labels)).label

    def weights(self, label_logprobs: Tensor) -> MixtureWeights:
        """The mixture, from the reference's [T] log q(y) in nats.

        In logarithms, so that any beta and any q(y), 0 included, give weights in [0, 1].
        """
        vocab_size = self.reference.vocab_size
        floor = self.smoothing / vocab_size + self.eps
        total = 1.0 + vocab_size * self.eps
        prior = label_logprobs.detach() + _log(1.0 - self.smoothing)
        if floor > 0:
            prior = torch.logaddexp(prior, torch.full_like(prior, math.log(floor)))
        log_odds = prior - math.log(total) + _log_expm1(self.beta)
        rest = torch.sigmoid(-log_odds)
        return MixtureWeights(
            label=torch.sigmoid(log_odds),
            reference=rest * ((1.0 - self.smoothing) / total),
            uniform=rest * ((self.smoothing + vocab_size * self.eps) / total),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SmoothedLabels:
    """(1 - smoothing) onehot(y) + smoothing / V.

    Args:
        labels: [T] int64.
        smoothing: share of the uniform distribution, in [0, 1].
    """

    labels: Tensor
    smoothing: float

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise UserError(f"smoothed labels: expected 0 <= smoothing <= 1, got {self.smoothing}")


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _log_expm1(x: float) -> float:
    """log(e^x - 1) without overflow; -inf at 0."""
    return x + math.log(-math.expm1(-x)) if x > 0 else -math.inf
