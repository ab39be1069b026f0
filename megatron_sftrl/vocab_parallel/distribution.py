"""TokenDistribution: what a loss author meets instead of a shard of logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.vocab_parallel.collectives import Meanwhile, shard_of
from megatron_sftrl.vocab_parallel.evaluation import TopLogits, evaluate, gather_top_k
from megatron_sftrl.vocab_parallel.output_layer import OutputLayer
from megatron_sftrl.vocab_parallel.statistics import (
    Expectation,
    LogSumExp,
    Pick,
    Scratch,
    Source,
    Statistic,
    Total,
    about,
    sources_of,
)


def answers(distributions: Sequence[TokenDistribution], statistics: Sequence[Statistic]) -> list[Tensor]:
    """[T] of each statistic, from what the distributions remember and one evaluation of all the rest.

    That is one MAX and one SUM all-reduce, or none. What is about one distribution alone is remembered there.
    """
    known: dict[Statistic, Tensor] = {}
    for distribution in distributions:
        known |= distribution._usable()
    if any(statistic not in known for statistic in statistics):
        along = [statistic for distribution in distributions for statistic in distribution._company()]
        asked = [statistic for statistic in dict.fromkeys([*statistics, *along]) if statistic not in known]
        meanwhile = next((each._meanwhile for each in distributions if each._meanwhile is not None), None)
        found = dict(zip(asked, evaluate(asked, meanwhile), strict=True))
        known |= found
        for distribution in distributions:
            own = {distribution._source}
            distribution._known |= {s: value for s, value in found.items() if own.issuperset(sources_of(s))}
    return [known[statistic] for statistic in statistics]


# Targets of a cross-entropy, described by [T] weights so that no [T, V] target is ever built: token by token
# a mixture of three distributions, the label, a reference model and the uniform one.


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
        """The mixture from [T] log q(y), nats; logarithms keep it in [0, 1] for any beta and q(y), 0 too."""
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
    """(1 - smoothing) onehot(y) + smoothing / V; labels [T] int64, smoothing in [0, 1]."""

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


Target = TiltedTarget | SmoothedLabels


class TokenDistribution:
    """softmax over a vocabulary at each of T tokens: logically [T, V], physically [T, V / tp].

    Every method returns [T] in nats, float32 (float64 for float64 logits), alike on all ranks of the group,
    and differentiable in this rank's logits unless it says otherwise. The logits are never modified. A
    question that was asked before costs nothing again; a new one costs one MAX and one SUM all-reduce,
    whatever it asks.
    """

    __slots__ = ("_anticipated", "_known", "_meanwhile", "_source", "_tempered")

    def __init__(self, source: Source, known: Mapping[Statistic, Tensor] | None = None) -> None:
        """Use `from_logits` or `from_output_layer`; answers in `known` are about this source alone."""
        self._source = source
        self._known = dict(known or {})
        self._anticipated: Tensor | None = None
        self._meanwhile: Meanwhile | None = None
        self._tempered: dict[float, TokenDistribution] = {}

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        vocab_size: int,
        group: dist.ProcessGroup | None = None,
        padded_vocab_size: int | None = None,
        is_scratch: bool = False,
    ) -> TokenDistribution:
        """The distribution whose columns are spread over a tensor-parallel group.

        Rank r holds the columns from r * V_local; columns from `vocab_size` on are padding: they are never
        read and get a gradient of exactly 0. The last rank may also hold an unpadded rest, as torch.chunk
        leaves it.

        Args:
            logits: [T, V_local] any floating dtype.
            vocab_size: V, without padding.
            group: the tensor-parallel group; None when `logits` hold the whole vocabulary.
            padded_vocab_size: V_local * tp, needed only where the padding is so heavy that the last rank
                holds no real column (such logits look like gathered ones).
            is_scratch: the logits are not needed after the backward of what is asked here: their gradient
                overwrites them where that is possible.
        Raises:
            UserError: the widths do not cover the vocabulary, or look like gathered logits.
        """
        if logits.dim() != 2 or not logits.is_floating_point():
            raise UserError(
                f"logits: expected floating point [T, V_local], got {logits.dtype} {list(logits.shape)}; "
                "flatten batch and sequence into T"
            )
        shard = shard_of(
            logits.shape[1], vocab_size=vocab_size, group=group, padded_vocab_size=padded_vocab_size
        )
        scratch = Scratch() if is_scratch else None
        return cls(Source(origin=logits, shard=shard, scratch=scratch))

    @classmethod
    def from_output_layer(
        cls,
        layer: OutputLayer,
        *,
        vocab_size: int,
        group: dist.ProcessGroup | None = None,
        padded_vocab_size: int | None = None,
    ) -> TokenDistribution:
        """The same from hidden states and output weights: logits exist for a chunk of tokens at a time.

        Every evaluation makes them once, and its backward once more. Arguments and errors of `from_logits`;
        columns as the rows of the layer's weight.
        """
        shard = shard_of(
            layer.shape[1], vocab_size=vocab_size, group=group, padded_vocab_size=padded_vocab_size
        )
        return cls(Source(origin=layer, shard=shard))

    @property
    def vocab_size(self) -> int:
        """V, without padding."""
        return self._source.shard.vocab_size

    @property
    def num_tokens(self) -> int:
        """T."""
        return self._source.num_tokens

    def logprobs(self, ids: Tensor) -> Tensor:
        """log p(ids[t]) at each token t; `ids` is [T] int64 in [0, V)."""
        return logprobs_together([self], ids)[0]

    def logprobs_of_each(self, ids: Tensor) -> Tensor:
        """[T, k] log p(ids[t, j]) of several ids at each token; `ids` is [T, k] int64 in [0, V).

        Meant for tens of ids: each is one more number per token in the reduction.
        """
        columns = ids.unbind(1)
        for column in columns:
            _check_ids(column, self)
        z = self._source
        log_sum, *picked = answers([self], [LogSumExp(z), *(Pick(z, column) for column in columns)])
        return torch.stack(picked, dim=1) - log_sum[:, None]

    def entropy(self) -> Tensor:
        """-sum_v p(v) log p(v)."""
        z = self._source
        log_sum, mean = answers([self], [LogSumExp(z), Expectation(z, z)])
        return log_sum - mean

    def mean_logprob(self) -> Tensor:
        """1/V sum_v log p(v)."""
        z = self._source
        total, log_sum = answers([self], [Total(z), LogSumExp(z)])
        return total / self.vocab_size - log_sum

    def cross_entropy(self, target: TokenDistribution | Target) -> Tensor:
        """-sum_v q(v) log p(v), q the target; no gradient flows into the target.

        The target is a distribution on the same columns, or a mixture: what `tilted` returns, SmoothedLabels.
        """
        if isinstance(target, TokenDistribution):
            z, u = self._source, target.detach()._source
            log_sum, expected = answers([self], [LogSumExp(z), Expectation(u, z)])
            return log_sum - expected
        _check_ids(target.labels, self)
        if isinstance(target, SmoothedLabels):
            return self._smoothed_cross_entropy(target)
        return self._tilted_cross_entropy(target)

    def kl_from(self, target: TokenDistribution) -> Tensor:
        """KL(target || self) = sum_v q(v) (log q(v) - log p(v)); gradient into self only."""
        fixed = target.detach()
        z, u = self._source, fixed._source
        log_sum, expected, fixed_log_sum, fixed_mean = answers(
            [self, fixed], [LogSumExp(z), Expectation(u, z), LogSumExp(u), Expectation(u, u)]
        )
        return (fixed_mean - fixed_log_sum) - (expected - log_sum)

    def kl_to(self, target: TokenDistribution) -> Tensor:
        """KL(self || target) = sum_v p(v) (log p(v) - log q(v)); gradient into self only."""
        fixed = target.detach()
        z, u = self._source, fixed._source
        log_sum, mean, fixed_log_sum, expected = answers(
            [self, fixed], [LogSumExp(z), Expectation(z, z), LogSumExp(u), Expectation(z, u)]
        )
        return (mean - log_sum) - (expected - fixed_log_sum)

    def tempered(self, tau: Tensor | float) -> TokenDistribution:
        """softmax(z / tau); `tau` is one number or [T], positive, and a constant for the gradient.

        Of one number it is the same distribution every time, which remembers its answers.
        """
        if isinstance(tau, float) and tau in self._tempered:
            return self._tempered[tau]
        source = self._source
        options = {"dtype": source.dtype, "device": source.device}
        if isinstance(tau, Tensor) and tau.shape == (self.num_tokens,):
            inverse = 1.0 / tau.detach().to(**options)
        elif isinstance(tau, Tensor):
            raise UserError(f"tau: expected a number or [T] = [{self.num_tokens}], got {list(tau.shape)}")
        elif tau > 0:
            inverse = torch.full((self.num_tokens,), 1.0 / tau, **options)
        else:
            raise UserError(f"tau: expected a positive temperature, got {tau}")
        if source.inverse_tau is not None:
            inverse = inverse * source.inverse_tau
        tempered = TokenDistribution(replace(source, inverse_tau=inverse))
        if isinstance(tau, float):
            self._tempered[tau] = tempered
        return tempered

    def top_k(self, k: int, *, with_ids: bool = False) -> TopLogits:
        """The k largest logits of each token without gradient, in one all-gather (all of them when k > V).

        The statistics behind `entropy` travel along, so that the entropy of a distribution without gradient
        costs no collective afterwards. With ids, twice as much travels.
        """
        if k < 1:
            raise UserError(f"top_k: expected k >= 1, got {k}")
        z = self._source
        top, mean = gather_top_k(z, min(k, self.vocab_size), with_ids=with_ids)
        if not self._needs_grad:
            self._known |= {LogSumExp(z): top.log_sum, Expectation(z, z): mean}
        return top

    def tilted(self, labels: Tensor, beta: float, smoothing: float = 0.0, eps: float = 0.0) -> TiltedTarget:
        """softmax(log p~ + beta 1[v = y]), p~ = (1 - smoothing) p + smoothing / V + eps, as a target.

        (GIFT, arXiv:2601.09233, Alg. 1.) Nothing is computed here and no gradient flows into it.

        Args:
            labels: [T] int64.
            beta: log-odds added to the label; dimensionless, >= 0.
            smoothing: share of the uniform distribution in the prior, in [0, 1].
            eps: added to every prior probability; >= 0.
        """
        _check_ids(labels, self)
        return TiltedTarget(labels=labels, reference=self.detach(), beta=beta, smoothing=smoothing, eps=eps)

    def detach(self) -> TokenDistribution:
        """The same distribution as a constant, which keeps the answers already given."""
        if not self._source.requires_grad:
            return self
        constant = replace(self._source, origin=self._source.origin.detach())
        moved = {self._source: constant}
        return TokenDistribution(
            constant, {about(statistic, moved): value.detach() for statistic, value in self._known.items()}
        )

    def anticipate(self, labels: Tensor) -> None:
        """Let the labels' log-probabilities and the entropy share the all-reduces of the first question."""
        _check_ids(labels, self)
        self._anticipated = labels

    def while_reducing(self, work: Meanwhile) -> None:
        """Do `work` during every reduction behind an answer, between its start and the wait for it.

        One process has nothing to wait for and leaves the work undone: its owner does it later.
        """
        self._meanwhile = work

    @property
    def _needs_grad(self) -> bool:
        """An answer given now has to carry a gradient."""
        return self._source.requires_grad and torch.is_grad_enabled()

    def _usable(self) -> dict[Statistic, Tensor]:
        """What is known, without what was found without the gradient that is needed now."""
        needed = self._needs_grad
        return {s: value for s, value in self._known.items() if value.requires_grad or not needed}

    def _company(self) -> list[Statistic]:
        """What comes along: the entropy of what is trained (every step logs it), and what is anticipated."""
        z, along = self._source, list[Statistic]()
        if self._needs_grad or self._anticipated is not None:
            along += [LogSumExp(z), Expectation(z, z)]
        if self._anticipated is not None:
            along.append(Pick(z, self._anticipated))
        return along

    def _smoothed_cross_entropy(self, target: SmoothedLabels) -> Tensor:
        z = self._source
        picked, log_sum, total = answers([self], [Pick(z, target.labels), LogSumExp(z), Total(z)])
        mean_logprob = total / self.vocab_size - log_sum
        return (1.0 - target.smoothing) * (log_sum - picked) - target.smoothing * mean_logprob

    def _tilted_cross_entropy(self, target: TiltedTarget) -> Tensor:
        z, u = self._source, target.reference._source
        statistics: list[Statistic] = [
            Pick(z, target.labels),
            LogSumExp(z),
            Expectation(u, z),
            Pick(u, target.labels),
            LogSumExp(u),
        ]
        if target.has_uniform:
            statistics.append(Total(z))
        picked, log_sum, expected, prior_picked, prior_log_sum, *total = answers(
            [self, target.reference], statistics
        )
        weights = target.weights(prior_picked - prior_log_sum)
        loss = weights.label * (log_sum - picked) + weights.reference * (log_sum - expected)
        return loss - weights.uniform * (total[0] / self.vocab_size - log_sum) if total else loss


def logprobs_together(distributions: Sequence[TokenDistribution], ids: Tensor) -> list[Tensor]:
    """[T] log p(ids) of each distribution, all in the same one MAX and one SUM all-reduce."""
    statistics: list[Statistic] = []
    for distribution in distributions:
        _check_ids(ids, distribution)
        statistics += [Pick(distribution._source, ids), LogSumExp(distribution._source)]
    found = answers(distributions, statistics)
    return [picked - log_sum for picked, log_sum in zip(found[::2], found[1::2], strict=True)]


def _check_ids(ids: Tensor, distribution: TokenDistribution) -> None:
    """Shape and dtype everywhere; the range on the CPU only, where looking at it does not stop a device."""
    if ids.shape != (distribution.num_tokens,) or ids.dtype != torch.int64:
        raise UserError(
            f"ids: expected int64 [T] = [{distribution.num_tokens}], got {ids.dtype} {list(ids.shape)}"
        )
    if (
        ids.device.type == "cpu"
        and ids.numel()
        and not 0 <= int(ids.min()) <= int(ids.max()) < distribution.vocab_size
    ):
        raise UserError(
            f"ids: expected 0 <= id < vocab_size = {distribution.vocab_size}, got "
            f"{int(ids.min())}..{int(ids.max())}; "
            "put any valid id where loss_mask is False"
        )
