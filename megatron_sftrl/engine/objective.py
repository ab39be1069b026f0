"""From last hidden states to the loss: through a micro-batch's logits, or fused with the output layer.

    logits      [T, V/tp] exist as Megatron makes them, for as long as the backward needs them
    two passes  the loss sees distributions whose logits are made for a chunk of tokens at a time, in the
                forward and again in the backward; in between only [T] vectors live
    one pass    token-local losses: chunk by chunk, each finished while its logits are hot

All three call the same loss function and give the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.errors import UserError
from megatron_sftrl.losses.api import LossInputs
from megatron_sftrl.losses.registry import Loss
from megatron_sftrl.models.architecture import padded_vocab_size
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import OutputLayer, TokenDistribution
from megatron_sftrl.vocab_parallel.one_pass import TokenValues, one_pass, weighted_sum
from megatron_sftrl.vocab_parallel.output_layer import tokens_per_chunk

Fused = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """A model's last stage and its hidden states, after the final norm: [T, 1, H], or [T/tp, 1, H] split.

    Args:
        weight: of the output layer, where it is not the model's own.
    """

    model: LanguageModel
    hidden_states: Tensor
    weight: Tensor | None = None

    def layer(self, *, chunk_bytes: int | None = None) -> OutputLayer:
        """The output layer, no logits made."""
        return self.model.output(self.hidden_states, chunk_bytes=chunk_bytes, weight=self.weight)

    def logits(self) -> Tensor:
        """[T, V_padded/tp]"""
        return self.model.logits(self.hidden_states, weight=self.weight)


class Objective:
    """How distributions and losses come from hidden states on this rank.

    Args:
        vocab_size: V, without padding.
        fused: `auto` fuses where the logits of a step's longest micro-batch are more than one chunk of them.
        dtype: of the logits.
        chunk_bytes: of the logits that exist at a time; None is a good size for the device.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        parallel: ParallelContext,
        fused: Fused,
        dtype: torch.dtype,
        chunk_bytes: int | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._fused = fused
        self._dtype = dtype
        self._chunk_bytes = chunk_bytes

    def longest(self, batches: Sequence[TokenBatch], *, over_all_ranks: bool = False) -> int:
        """Tokens of the longest whole micro-batch: of this rank, or (a collective) over_all_ranks.

        It decides for all of a step whether they are fused. A step must not mix: the fused layer adds the
        weight's gradient to main_grad by itself and marks the weight for Megatron's DDP, which would then
        leave out the gradient of one that is not fused.
        """
        longest = max(batch.num_tokens for batch in batches)
        if self._fused != "auto" or not over_all_ranks or self._parallel.dp_size == 1:
            return longest
        found = torch.tensor(longest, device=self._parallel.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._parallel.dp_group)
        return int(found)

    def distribution(self, head: OutputHead, *, longest: int) -> TokenDistribution:
        """What the head says of this rank's context-parallel share; `longest` as found by longest()."""
        if not self._is_fused(longest):
            return self._of_logits(head.logits())
        layer = head.layer(chunk_bytes=self._chunk_bytes)
        return TokenDistribution.from_output_layer(
            layer,
            vocab_size=self._vocab_size,
            group=self._tp_group,
            padded_vocab_size=layer.shape[1] * self._parallel.tp_size,
        )

    def values(
        self,
        loss: Loss,
        policy: OutputHead,
        reference: OutputHead | None,
        batch: TokenBatch,
        *,
        longest: int,
        weighted: Tensor | None = None,
        sampled_at: float | None = None,
    ) -> TokenValues:
        """The loss of this rank's context-parallel share of a micro-batch, ready for its backward.

        Args:
            reference: the second model, without gradient.
            longest: as found by longest().
            weighted: as for one_pass.
            sampled_at: as in engine.policy.Part; SEEN are then among the metrics.
        """
        if loss.is_token_local and self._is_fused(longest):

            def of_tokens(
                policy: TokenDistribution, reference: TokenDistribution | None, batch: TokenBatch
            ) -> tuple[Tensor, dict[str, Tensor]]:
                inputs = LossInputs(policy=policy, reference=reference, batch=batch, is_part=True)
                return _loss_and_metrics(loss, inputs, sampled_at)

            size = self._chunk_bytes
            prior = None if reference is None else reference.layer(chunk_bytes=size)
            to_distribution = partial(self._of_logits, is_scratch=True)
            return one_pass(
                of_tokens, policy.layer(chunk_bytes=size), prior, batch, to_distribution, weighted=weighted
            )
        inputs = LossInputs(
            policy=self.distribution(policy, longest=longest),
            reference=None if reference is None else self.distribution(reference, longest=longest),
            batch=batch,
            cp_group=self._parallel.cp_group if self._parallel.cp_size > 1 else None,
        )
        token_loss, metrics = _loss_and_metrics(loss, inputs, sampled_at)
        total = weighted_sum(token_loss, batch.token_weight)
        return TokenValues(
            total=total,
            token_loss=token_loss.detach(),
            metrics=metrics,
            is_trained=total.requires_grad or not torch.is_grad_enabled(),
        )

    @property
    def _tp_group(self):
        return self._parallel.tp_group if self._parallel.tp_size > 1 else None

    def _is_fused(self, longest: int) -> bool:
        """Told from sizes alone, so that all micro-batches of a step and all ranks take the same way."""
        if self._fused != "auto":
            return self._fused == "on"
        parallel = self._parallel
        num_columns = padded_vocab_size(self._vocab_size, parallel.tp_size) // parallel.tp_size
        share = -(-longest // parallel.cp_size)
        most = tokens_per_chunk(num_columns, self._dtype, parallel.device, chunk_bytes=self._chunk_bytes)
        return share > most

    def _of_logits(self, logits: Tensor, *, is_scratch: bool = False) -> TokenDistribution:
        return TokenDistribution.from_logits(
            logits,
            vocab_size=self._vocab_size,
            group=self._tp_group,
            padded_vocab_size=logits.shape[-1] * self._parallel.tp_size,
            is_scratch=is_scratch,
        )


SEEN = ("rollout/old_logprobs", "rollout/entropies")
"""What is seen of each token at the sampling temperature, in nats; no loss has metrics of these names."""


def _loss_and_metrics(
    loss: Loss, inputs: LossInputs, sampled_at: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the loss says, and the two metrics that every loss has.

    entropy and nll are the policy's at temperature 1, in nats, unless the loss gives its own (at another
    temperature, say).
    """
    seen: dict[str, Tensor] = {}
    if sampled_at is not None:
        inputs, seen = _with_own_old_logprobs(inputs, sampled_at)
    output = loss(inputs)
    metrics = {**output.metrics, **seen}
    # Both came along with the loss's own questions: no collective of their own.
    if "entropy" not in metrics:
        metrics["entropy"] = inputs.policy.entropy().detach()
    if "nll" not in metrics:
        metrics["nll"] = -inputs.policy.logprobs(inputs.batch.labels).detach()
    return output.token_loss, metrics


def _with_own_old_logprobs(inputs: LossInputs, temperature: float) -> tuple[LossInputs, dict[str, Tensor]]:
    """The inputs with the policy's own log-probabilities as the old ones, and what was SEEN.

    They are constants for the gradient. The loss asks the same distribution next: it is evaluated once.
    """
    batch, policy = inputs.batch, inputs.policy
    if temperature != 1.0:
        policy = policy.tempered(temperature)
        policy.anticipate(batch.labels)
    found = (policy.logprobs(batch.labels).detach(), policy.entropy().detach())
    # A masked label may be impossible; masked positions hold finite values.
    old, entropies = (torch.where(batch.loss_mask, each, 0.0) for each in found)
    inputs = dataclasses.replace(inputs, batch=dataclasses.replace(batch, old_logprobs=old))
    return inputs, dict(zip(SEEN, (old, entropies), strict=True))


# Per-token numbers of the micro-batches, summed to one number each for the whole step.


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchReport:
    """Sums over this rank's tokens of one micro-batch, weighted with token_weight.

    Args:
        sums: [2 + len(names)] fp32: sum of weights, loss, then each metric of `names`.
        has_nonfinite_loss: [] bool, a trained token's loss is NaN or infinite.
        is_trained: False where a gradient was asked for and the loss has none.
        missing: of the names, those that some of the micro-batch's tokens lack.
        seen: [2, T/cp] fp32, SEEN of each token that has a weight, where that was asked for.
    """

    names: tuple[str, ...]
    sums: Tensor
    has_nonfinite_loss: Tensor
    is_trained: bool
    missing: tuple[str, ...]
    seen: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step over all ranks, the same on every rank but for `seen`.

    Args:
        weight: sum of token_weight.
        loss: sum of token_loss * token_weight, in nats for the losses of this package.
        metrics: averages over loss tokens with token_weight.
        nonfinite_microbatches: (dp_rank, micro-batch) whose loss was NaN or infinite.
        is_trained: False where gradients were asked for and no micro-batch's loss has one.
        seen: of each micro-batch of this rank, [2, T] fp32: SEEN of the tokens that have a weight. Of a part
            with `sampled_at`, on the last stage; empty otherwise.
    """

    weight: float
    loss: float
    metrics: Mapping[str, float]
    nonfinite_microbatches: tuple[tuple[int, int], ...]
    is_trained: bool = True
    seen: tuple[Tensor, ...] = ()


def microbatch_report(values: TokenValues, token_weight: Tensor) -> MicrobatchReport:
    """Weigh [T] vectors into sums; positions of weight 0 count for nothing, whatever they hold."""
    token_loss, metrics = values.token_loss, dict(values.metrics)
    seen = [metrics.pop(name).detach().float() for name in SEEN if name in metrics]
    names = tuple(sorted(metrics))
    rows = torch.stack([torch.ones_like(token_weight), token_loss, *(metrics[name] for name in names)])
    is_counted = token_weight > 0
    weighted = torch.where(is_counted, rows.detach().float() * token_weight, 0.0)
    is_nonfinite = (~torch.isfinite(token_loss.detach()) & is_counted).any()
    return MicrobatchReport(
        names=names,
        sums=weighted.sum(dim=1),
        has_nonfinite_loss=is_nonfinite,
        is_trained=values.is_trained,
        missing=tuple(sorted(values.missing)),
        seen=torch.stack(seen) if seen else None,
    )


def combine_reports(reports: Sequence[StepReport], *, loss_name: str) -> StepReport:
    """Several steps as one: losses add up, metrics are averaged with their steps' weights.

    Raises:
        UserError: a metric that some of the steps lack.
    """
    weight = sum(report.weight for report in reports)
    names = reports[0].metrics
    _check_names(
        loss_name, {f"mini-batch {index}": frozenset(each.metrics) for index, each in enumerate(reports)}
    )
    return StepReport(
        weight=weight,
        loss=sum(report.loss for report in reports),
        metrics={
            name: sum(report.weight * report.metrics[name] for report in reports) / weight for name in names
        },
        nonfinite_microbatches=(),
        is_trained=all(report.is_trained for report in reports),
    )


def reduce_reports(
    reports: Sequence[MicrobatchReport], parallel: ParallelContext, *, loss_name: str
) -> StepReport:
    """Sum over micro-batches and over dp x cp on the last stage, then tell the other stages.

    Two small all-reduces and, when pp > 1, one broadcast for the whole step.

    Raises:
        UserError: on every rank, a metric that some micro-batch lacks: its average over the step is unknown.
    """
    result: list[StepReport | str | None] = [None]
    if parallel.is_last_stage:
        try:
            _agree_on_names(reports, parallel, loss_name)
            result = [_reduce_on_last_stage(reports, parallel)]
        except UserError as error:
            result = [str(error)]
    if parallel.pp_size > 1:
        dist.broadcast_object_list(result, src=parallel.last_stage_rank, group=parallel.pp_group)
    if isinstance(result[0], str):
        raise UserError(result[0])
    assert result[0] is not None
    return result[0]


def _agree_on_names(reports: Sequence[MicrobatchReport], parallel: ParallelContext, loss_name: str) -> None:
    """Every micro-batch of every rank has the same metrics, or all ranks raise the same UserError."""
    kinds = {(report.names, report.missing) for report in reports}
    print_of_names = zlib.crc32(repr(sorted(kinds)).encode())
    is_one = len(kinds) == 1 and not reports[0].missing
    # The numbers that follow have as many elements as there are names: ranks must not differ in it.
    extremes = torch.tensor([print_of_names, -print_of_names, not is_one], device=reports[0].sums.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=parallel.dp_cp_group)
    highest, lowest, has_differences = extremes.tolist()
    if highest == -lowest and not has_differences:
        return
    mine = {
        f"micro-batch {index} of data-parallel rank {parallel.dp_rank}": (report.names, report.missing)
        for index, report in enumerate(reports)
    }
    everyone: list[dict] = [{}] * dist.get_world_size(parallel.dp_cp_group)
    dist.all_gather_object(everyone, mine, group=parallel.dp_cp_group)
    given: dict[str, frozenset[str]] = {}
    for of_rank in everyone:
        for place, (names, missing) in of_rank.items():
            # Context-parallel ranks share a micro-batch: what one of them lacks, it lacks.
            given[place] = given.get(place, frozenset(names)) & (frozenset(names) - frozenset(missing))
            given |= {f"some tokens of {place}": frozenset(names)} if missing else {}
    _check_names(loss_name, given)


def _check_names(loss_name: str, given: Mapping[str, frozenset[str]]) -> None:
    """Raise UserError unless every place gives the same names."""
    every = frozenset[str]().union(*given.values())
    for name in sorted(every):
        having = [place for place, names in given.items() if name in names]
        lacking = [place for place, names in given.items() if name not in names]
        if lacking:
            raise UserError(
                f"loss {loss_name!r}: metric {name!r} is given for {_some(having)}, and not for "
                f"{_some(lacking)}: its average over all loss tokens is unknown. Return every metric for "
                "every micro-batch, [T] values, for example zeros where it says nothing"
            )


def _some(places: Sequence[str], *, most: int = 3) -> str:
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")


def _reduce_on_last_stage(reports: Sequence[MicrobatchReport], parallel: ParallelContext) -> StepReport:
    names = reports[0].names
    # fp64: the sum over thousands of micro-batches and ranks must not depend on their number.
    sums = torch.stack([report.sums for report in reports]).double().sum(dim=0)
    flags = torch.zeros(parallel.dp_size, len(reports), dtype=torch.float64, device=sums.device)
    flags[parallel.dp_rank] = torch.stack([report.has_nonfinite_loss for report in reports]).double()
    num_trained = sums.new_tensor([sum(report.is_trained for report in reports)])
    packed = torch.cat([sums, num_trained, flags.flatten()])
    dist.all_reduce(packed, group=parallel.dp_cp_group)
    *values, num_trained = packed[: sums.numel() + 1].tolist()
    flagged = packed[sums.numel() + 1 :].view_as(flags).nonzero().tolist()
    weight, loss = values[0], values[1]
    metrics = {
        name: value / weight if weight else math.nan for name, value in zip(names, values[2:], strict=True)
    }
    return StepReport(
        weight=weight,
        loss=loss,
        metrics=metrics,
        nonfinite_microbatches=tuple((rank, index) for rank, index in flagged),
        is_trained=num_trained > 0,
    )
