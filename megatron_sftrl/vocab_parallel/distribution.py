"""TokenDistribution: what a loss author meets instead of a shard of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

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
)

# Questions about distributions, answered together and only once.
#
# Each distribution is a `Subject`: its logits and the answers it already gave. `answers` takes questions
# about any number of subjects, evaluates what is not known in one MAX and one SUM all-reduce, and
# remembers it.


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """A known value, and the ids it is about: the tensor itself and its version when it was asked."""

    value: Tensor
    ids: Tensor | None = None
    ids_version: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Subject:
    """One distribution.

    Args:
        source: its logits.
        known: answers so far, by kind and identity of the ids.
        anticipated: labels whose log-probabilities, with the entropy, come along with the first question.
        meanwhile: work for the time of the reductions behind its answers.
    """

    source: Source
    known: dict[tuple[str, int], Answer] = field(default_factory=dict)
    anticipated: Tensor | None = None
    meanwhile: Meanwhile | None = None

    @property
    def needs_grad(self) -> bool:
        """An answer asked now has to carry a gradient."""
        return self.source.requires_grad and torch.is_grad_enabled()

    def remember(self, kind: str, value: Tensor, ids: Tensor | None = None) -> None:
        """Keep an answer; ids are held, so that their identity stays theirs."""
        version = 0 if ids is None else ids._version
        self.known[kind, id(ids)] = Answer(value=value, ids=ids, ids_version=version)

    def detached(self) -> Subject:
        """The same distribution without gradient, knowing what this one knows."""
        if not self.source.requires_grad:
            return self
        source = replace(self.source, origin=self.source.origin.detach())
        known = {
            key: Answer(value=answer.value.detach(), ids=answer.ids, ids_version=answer.ids_version)
            for key, answer in self.known.items()
        }
        return Subject(source=source, known=known)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """log_sum: log sum exp(z - M).  mean: E_p[z - M].  total: sum (z - M).  pick: z - M at the ids `about`.
    under: E_q[z - M], q the distribution `about`; every expectation but this one is remembered."""

    of: Subject
    kind: Literal["log_sum", "mean", "total", "pick", "under"]
    about: Tensor | Subject | None = None

    def statistic(self) -> Statistic:
        """What `evaluate` computes for this question."""
        source = self.of.source
        if self.kind == "log_sum":
            return LogSumExp(source)
        if self.kind == "mean":
            return Expectation(source, source)
        if self.kind == "total":
            return Total(source)
        if isinstance(self.about, Tensor):
            return Pick(source, self.about)
        assert isinstance(self.about, Subject)
        return Expectation(self.about.source, source)

    def recall(self) -> Tensor | None:
        """The answer, if it is known and carries a gradient where one is needed."""
        answer = self.of.known.get((self.kind, id(self.about)))
        if answer is None or (self.of.needs_grad and not answer.value.requires_grad):
            return None
        is_same = answer.ids is None or answer.ids._version == answer.ids_version
        return answer.value if is_same else None


def answers(questions: Sequence[Question]) -> list[Tensor]:
    """[T] for each question, in order."""
    results = [question.recall() for question in questions]
    if all(value is not None for value in results):
        return [value for value in results if value is not None]
    unknown = [question for question, value in zip(questions, results, strict=True) if value is None]
    asked = unknown + [question for question in _company(questions) if question.recall() is None]
    asked = list({(id(q.of), q.kind, id(q.about)): q for q in asked}.values())
    found: dict[tuple[int, str, int], Tensor] = {}
    meanwhile = next((q.of.meanwhile for q in asked if q.of.meanwhile is not None), None)
    for question, value in zip(asked, evaluate([q.statistic() for q in asked], meanwhile), strict=True):
        found[id(question.of), question.kind, id(question.about)] = value
        if not isinstance(question.about, Subject):
            question.of.remember(question.kind, value, question.about)
    return [
        found[id(question.of), question.kind, id(question.about)] if value is None else value
        for question, value in zip(questions, results, strict=True)
    ]


def _company(questions: Sequence[Question]) -> list[Question]:
    """What comes along: the entropy of whatever is trained (every step logs it) and what was anticipated."""
    along: list[Question] = []
    for subject in {id(question.of): question.of for question in questions}.values():
        if subject.needs_grad or subject.anticipated is not None:
            along += [Question(subject, "log_sum"), Question(subject, "mean")]
        if subject.anticipated is not None:
            along.append(Question(subject, "pick", subject.anticipated))
    return along


# Targets of a cross-entropy, described by [T] weights so that no [T, V] target is ever built.
#
# A target is, token by token, a mixture of three distributions: the label, a reference model, the uniform
# one.


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


Target = TiltedTarget | SmoothedLabels


class TokenDistribution:
    """softmax over a vocabulary at each of T tokens: logically [T, V], physically [T, V / tp].

    Every method returns [T] in nats, float32 (float64 for float64 logits), alike on all ranks of the group,
    and differentiable in this rank's logits unless it says otherwise. The logits are never modified. A
    question that was asked before costs nothing again; a new one costs one MAX and one SUM all-reduce,
    whatever it asks.
    """

    __slots__ = ("_subject",)

    def __init__(self, subject: Subject) -> None:
        """Use `from_logits` or `from_output_layer`."""
        self._subject = subject

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
            is_scratch: nobody needs the logits after the backward of what is asked here: their gradient
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
        return cls(Subject(source=Source(origin=logits, shard=shard, scratch=scratch)))

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
        return cls(Subject(source=Source(origin=layer, shard=shard)))

    @property
    def vocab_size(self) -> int:
        """V, without padding."""
        return self._subject.source.shard.vocab_size

    @property
    def num_tokens(self) -> int:
        """T."""
        return self._subject.source.num_tokens

    def logprobs(self, ids: Tensor) -> Tensor:
        """log p(ids[t]) at each token t; `ids` is [T] int64 in [0, V)."""
        return logprobs_together([self], ids)[0]

    def entropy(self) -> Tensor:
        """-sum_v p(v) log p(v)."""
        log_sum, mean = answers([Question(self._subject, "log_sum"), Question(self._subject, "mean")])
        return log_sum - mean

    def mean_logprob(self) -> Tensor:
        """1/V sum_v log p(v)."""
        total, log_sum = answers([Question(self._subject, "total"), Question(self._subject, "log_sum")])
        return total / self.vocab_size - log_sum

    def cross_entropy(self, target: TokenDistribution | Target) -> Tensor:
        """-sum_v q(v) log p(v), q the target; no gradient flows into the target.

        Args:
            target: another distribution on the same columns, or a mixture: what `tilted` returns,
                SmoothedLabels.
        """
        me = self._subject
        if isinstance(target, TokenDistribution):
            under = Question(me, "under", target._subject.detached())
            log_sum, expected = answers([Question(me, "log_sum"), under])
            return log_sum - expected
        _check_ids(target.labels, self)
        if isinstance(target, SmoothedLabels):
            return self._smoothed_cross_entropy(target)
        return self._tilted_cross_entropy(target)

    def kl_from(self, target: TokenDistribution) -> Tensor:
        """KL(target || self) = sum_v q(v) (log q(v) - log p(v)); gradient into self only."""
        me, fixed = self._subject, target._subject.detached()
        log_sum, expected, fixed_log_sum, fixed_mean = answers(
            [
                Question(me, "log_sum"),
                Question(me, "under", fixed),
                Question(fixed, "log_sum"),
                Question(fixed, "mean"),
            ]
        )
        return (fixed_mean - fixed_log_sum) - (expected - log_sum)

    def kl_to(self, target: TokenDistribution) -> Tensor:
        """KL(self || target) = sum_v p(v) (log p(v) - log q(v)); gradient into self only."""
        me, fixed = self._subject, target._subject.detached()
        log_sum, mean, fixed_log_sum, expected = answers(
            [
                Question(me, "log_sum"),
                Question(me, "mean"),
                Question(fixed, "log_sum"),
                Question(fixed, "under", me),
            ]
        )
        return (mean - log_sum) - (expected - fixed_log_sum)

    def tempered(self, tau: Tensor | float) -> TokenDistribution:
        """softmax(z / tau); `tau` is one number or [T], positive, and a constant for the gradient."""
        source = self._subject.source
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
        hotter = replace(source, inverse_tau=inverse)
        return TokenDistribution(Subject(source=hotter))

    def top_k(self, k: int) -> TopLogits:
        """The k largest logits of each token without gradient, in one all-gather (all of them when k > V).

        The statistics behind `entropy` travel along, so that the entropy of a distribution without gradient
        costs no collective afterwards.
        """
        if k < 1:
            raise UserError(f"top_k: expected k >= 1, got {k}")
        top, log_sum, mean = gather_top_k(self._subject.source, min(k, self.vocab_size))
        if not self._subject.needs_grad:
            self._subject.remember("log_sum", log_sum)
            self._subject.remember("mean", mean)
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
        constant = self._subject.detached()
        return self if constant is self._subject else TokenDistribution(constant)

    def anticipate(self, labels: Tensor) -> None:
        """Let the labels' log-probabilities and the entropy come along with the first question asked.

        They ride in the same two all-reduces, so that a loss may ask in any order without paying twice.
        """
        _check_ids(labels, self)
        self._subject.anticipated = labels

    def while_reducing(self, work: Meanwhile) -> None:
        """Do `work` during every reduction behind an answer, between its start and the wait for it.

        One process reduces nothing and does not do it: whoever needs the work done must be able to do it.
        """
        self._subject.meanwhile = work

    def _smoothed_cross_entropy(self, target: SmoothedLabels) -> Tensor:
        me = self._subject
        questions = [
            Question(me, "pick", target.labels),
            Question(me, "log_sum"),
            Question(me, "total"),
        ]
        picked, log_sum, total = answers(questions)
        mean_logprob = total / self.vocab_size - log_sum
        return (1.0 - target.smoothing) * (log_sum - picked) - target.smoothing * mean_logprob

    def _tilted_cross_entropy(self, target: TiltedTarget) -> Tensor:
        me, prior = self._subject, target.reference._subject
        questions = [
            Question(me, "pick", target.labels),
            Question(me, "log_sum"),
            Question(me, "under", prior),
            Question(prior, "pick", target.labels),
            Question(prior, "log_sum"),
        ]
        if target.has_uniform:
            questions.append(Question(me, "total"))
        picked, log_sum, expected, prior_picked, prior_log_sum, *total = answers(questions)
        weights = target.weights(prior_picked - prior_log_sum)
        loss = weights.label * (log_sum - picked) + weights.reference * (log_sum - expected)
        return loss - weights.uniform * (total[0] / self.vocab_size - log_sum) if total else loss


def logprobs_together(distributions: Sequence[TokenDistribution], ids: Tensor) -> list[Tensor]:
    """[T] log p(ids) of each distribution, all in the same one MAX and one SUM all-reduce."""
    questions: list[Question] = []
    for distribution in distributions:
        _check_ids(ids, distribution)
        subject = distribution._subject
        questions += [Question(subject, "pick", ids), Question(subject, "log_sum")]
    found = answers(questions)
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
