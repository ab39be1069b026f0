"""Several statistics of several vocabulary-sharded distributions, in one MAX and one SUM all-reduce.

With z the logits of a distribution, M their maximum, p = softmax(z), and q another distribution's softmax:

    LogSumExp    log sum_v exp(z_v - M)          d/dz = p
    Pick         z_y - M                         d/dz = onehot(y)
    Total        sum_v (z_v - M)                 d/dz = 1
    Expectation  E_q[z - M]                      d/dz = q,   d/du = q ((z - M) - E_q[z - M])   (u: q's logits)

Everything is relative to M, so that log-probabilities of logits near 1e4 keep all their digits; M cancels in
every quantity that does not change when a constant is added to z, and only such quantities leave this
folder. Hence M is a constant for the gradient.

arithmetic.py has one rank's sums and the way back, evaluation.py the order of events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.vocab_parallel.collectives import VocabShard
from megatron_sftrl.vocab_parallel.output_layer import OutputLayer

# What can be asked about distributions. Two statistics are equal where they ask the same of the same logits:
# equality is the key under which answers are remembered.


@dataclass(frozen=True, slots=True)
class LogSumExp:
    """log sum_v exp(z_v - M)."""

    of: Source


@dataclass(frozen=True, slots=True)
class Pick:
    """z_y - M at one id per token ([T] int64), z and M of `of`.

    `asked` is the identity of `ids` and their version when they were asked about, which equality compares:
    ids that were modified in place since are other ids. The tensor is held, so its identity stays its own.
    """

    of: Source
    ids: Tensor = field(compare=False)
    asked: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.asked is None:
            object.__setattr__(self, "asked", (id(self.ids), self.ids._version))


@dataclass(frozen=True, slots=True)
class Total:
    """sum_v (z_v - M) over the vocabulary."""

    of: Source


@dataclass(frozen=True, slots=True)
class Expectation:
    """sum_v softmax(weights)_v (z_v - M), z and M of `values`."""

    weights: Source
    values: Source


Statistic = LogSumExp | Pick | Total | Expectation


def sources_of(statistic: Statistic) -> tuple[Source, ...]:
    """The logits it is made of."""
    if isinstance(statistic, Expectation):
        return (statistic.weights, statistic.values)
    return (statistic.of,)


def about(statistic: Statistic, moved: Mapping[Source, Source]) -> Statistic:
    """The same of other sources."""
    if isinstance(statistic, Expectation):
        return Expectation(moved[statistic.weights], moved[statistic.values])
    return replace(statistic, of=moved[statistic.of])


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What is computed together: statistics, and their sources without repetition."""

    statistics: tuple[Statistic, ...]
    sources: tuple[Source, ...]
    dtype: torch.dtype

    @staticmethod
    def of(statistics: Iterable[Statistic]) -> Evaluation:
        """Refuses distributions that differ in columns or tokens."""
        statistics = tuple(statistics)
        sources = tuple(dict.fromkeys(source for each in statistics for source in sources_of(each)))
        for source in sources:
            _check_alike(sources[0], source)
        is_double = any(source.dtype == torch.float64 for source in sources)
        return Evaluation(statistics, sources, torch.float64 if is_double else torch.float32)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.sources[0].num_tokens

    def index(self, source: Source) -> int:
        """Where the source stands in `sources`."""
        return self.sources.index(source)

    def chunks(self) -> Iterator[tuple[slice, Evaluation]]:
        """The same of some tokens after the others, their logits at hand; whole where all logits exist."""
        layers = [source.origin for source in self.sources if isinstance(source.origin, OutputLayer)]
        if not layers:
            yield slice(0, self.num_tokens), self
            return
        widest = max(layers, key=lambda layer: layer.shape[1] * layer.dtype.itemsize)
        different = {layer.key: layer for layer in layers}
        chunks = widest.chunks(self.num_tokens)
        longest = max((rows.stop - rows.start for rows in chunks), default=0)
        buffers = {key: layer.buffer(longest) for key, layer in different.items()}
        for rows in chunks:
            yield rows, self._at(rows, buffers)

    def _at(self, rows: slice, buffers: Mapping[tuple[int, ...], Tensor]) -> Evaluation:
        made: dict[tuple[int, ...], Tensor] = {}
        moved: dict[Source, Source] = {}
        for source in self.sources:
            if source.key not in made:
                made[source.key] = _logits_at(source, rows, buffers)
            moved[source] = source.at(rows, made[source.key])
        statistics = tuple(
            Pick(moved[each.of], each.ids[rows]) if isinstance(each, Pick) else about(each, moved)
            for each in self.statistics
        )
        return Evaluation(statistics, tuple(moved.values()), self.dtype)


def _check_alike(first: Source, other: Source) -> None:
    expected, got = first.shard, other.shard
    if got.group is not expected.group or first.num_tokens != other.num_tokens:
        raise UserError(
            f"distributions compared with each other: expected the same group and T = {first.num_tokens}, "
            f"got T = {other.num_tokens}; run both models on the same batch and layout"
        )
    if (got.vocab_size, got.start, got.num_columns) != (
        expected.vocab_size,
        expected.start,
        expected.num_columns,
    ):
        raise UserError(
            f"distributions compared with each other: expected columns {expected.start} + "
            f"{expected.num_columns} "
            f"of {expected.vocab_size}, got {got.start} + {got.num_columns} of {got.vocab_size}; "
            "split both vocabularies alike"
        )


def _logits_at(source: Source, rows: slice, buffers: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    layer = source.origin
    return layer.logits(rows, buffers[layer.key]) if isinstance(layer, OutputLayer) else layer[rows]


@dataclass(slots=True, kw_only=True, eq=False)
class Scratch:
    """Logits that are not needed after the loss: their gradient takes their place.

    `num_readers` evaluations read them again in their backward; of several, the first may not overwrite.
    """

    num_readers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Sharded logits as the arithmetic needs them: z = logits[:, :num_columns] * inverse_tau.

    Args:
        origin: [T, V_local] logits of any floating dtype, or the output layer that makes them.
        inverse_tau: [T] one over the temperature, in the working dtype, or None for temperature 1.
        scratch: of logits that may be overwritten; None for those that must stay.
    """

    origin: Tensor | OutputLayer
    shard: VocabShard
    inverse_tau: Tensor | None = None
    scratch: Scratch | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.origin.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the logits are or will be."""
        return self.origin.device

    @property
    def requires_grad(self) -> bool:
        """Somebody wants d / d logits."""
        return self.origin.requires_grad

    @property
    def key(self) -> tuple[int, ...]:
        """Alike for sources over the same logits, whatever their temperatures, with gradient or without."""
        return self.origin.key if isinstance(self.origin, OutputLayer) else (self.origin.data_ptr(),)

    @property
    def logits(self) -> Tensor:
        """[T, V_local]; only where they exist."""
        assert isinstance(self.origin, Tensor), "logits of an output layer exist for a chunk of rows: at()"
        return self.origin

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every reduction: float64 for float64 logits, float32 for all others."""
        return torch.float64 if self.origin.dtype == torch.float64 else torch.float32

    @property
    def real_logits(self) -> Tensor:
        """[T, num_columns] the logits without padding; a view."""
        return self.logits[:, : self.shard.num_columns]

    def scaled(self, differences: Tensor) -> Tensor:
        """[T] differences of raw logits, divided by the temperature."""
        return differences if self.inverse_tau is None else differences * self.inverse_tau

    def at(self, rows: slice, logits: Tensor) -> Source:
        """Some of the tokens, whose [rows, V_local] logits were made for them."""
        inverse = None if self.inverse_tau is None else self.inverse_tau[rows]
        return Source(origin=logits, shard=self.shard, inverse_tau=inverse, scratch=Scratch(num_readers=1))


def finite_maximum(maximum: Tensor) -> Tensor:
    """The maximum, 0 where it is -inf."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


@dataclass(slots=True, eq=False)
class Terms:
    """The gradient into one source i, as coefficients [T] of what stands in the columns:

    dz = exp(z - M) * (constant + sum_j linear[j] shift_j) + sum_j other[j] exp(shift_j) + uniform + onehots
    """

    constant: Tensor
    linear: dict[int, Tensor]
    other: dict[int, Tensor]
    uniform: Tensor | None
    onehots: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(
        evaluation: Evaluation,
        i: int,
        grads: Sequence[Tensor | None],
        values: Sequence[Tensor],
        partitions: Tensor,
    ) -> Terms | None:
        """None when nothing flows into the source."""
        terms = Terms(torch.zeros_like(partitions[i]), {}, {}, None, [])
        source, is_touched = evaluation.sources[i], False
        for statistic, grad, value in zip(evaluation.statistics, grads, values, strict=True):
            if grad is None or source not in sources_of(statistic):
                continue
            is_touched = True
            if isinstance(statistic, LogSumExp):
                terms.constant += grad / partitions[i]
            elif isinstance(statistic, Pick):
                terms.onehots.append((statistic.ids, grad))
            elif isinstance(statistic, Total):
                terms.uniform = grad if terms.uniform is None else terms.uniform + grad
            else:
                weights, j = evaluation.index(statistic.weights), evaluation.index(statistic.values)
                share = grad / partitions[weights]
                if weights == i:
                    terms.constant -= share * value
                    terms.linear[j] = terms.linear[j] + share if j in terms.linear else share
                if j == i == weights:
                    terms.constant += share
                elif j == i:
                    terms.other[weights] = terms.other[weights] + share if weights in terms.other else share
        return terms if is_touched else None
