"""Runs a loss on one rank's micro-batches, as the engine does on the last pipeline stage.

This file is all that a rank worker imports: losses and distributions, no Megatron.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.errors import UserError
from megatron_sftrl.losses import LossInputs, build_loss, weighted_sum
from megatron_sftrl.losses.registry import Loss
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import OutputLayer, TokenDistribution
from megatron_sftrl.vocab_parallel.one_pass import one_pass

LogitsPath = Literal["logits", "two_passes", "one_pass"]
"""How logits come to be (engine/objective.py): there, made by the output layer for every question, or made
once for a token-local loss."""
_TOKENS_PER_CHUNK = 7  # of a fused output layer: several chunks, and sequences cut by them


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A registered loss by name with its own options, as a worker can build it from its modules."""

    name: str
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    modules: tuple[str, ...] = ()

    def build(self) -> Loss:
        """The loss; ValueError as in `build_loss`."""
        return build_loss(self.name, self.options, self.modules)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """One micro-batch on one rank.

    Args:
        rows: [t] int64, where its tokens stand in the whole step.
        first_column, num_columns: real columns of the vocabulary held here; what follows is padding.
        policy, reference: [t, V_local] logits, which the loss gets by `path`.
    """

    batch: TokenBatch
    rows: Tensor
    first_column: int
    num_columns: int
    policy: Tensor
    reference: Tensor | None
    path: LogitsPath = "logits"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a loss made of a piece, in token_loss and metrics [t].

    `gradient` is [t, V_local] of sum(token_loss * token_weight) with respect to the logits.
    """

    token_loss: Tensor
    gradient: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroups:
    """Rank numbers of every tensor-parallel and context-parallel group; empty where there is none.

    `padded_vocab_size` is the columns over all ranks of a tensor-parallel group.
    """

    vocab_size: int
    padded_vocab_size: int
    tp: tuple[tuple[int, ...], ...] = ()
    cp: tuple[tuple[int, ...], ...] = ()


def prepare(spec: LossSpec) -> None:
    """Build the loss, and with that import torch, before a check's time is measured."""
    spec.build()


def evaluate_on_rank(spec: LossSpec, pieces: Sequence[Sequence[Piece]], groups: RankGroups) -> list[Outcome]:
    """This rank's micro-batches out of every rank's; a rank without any (an early stage) only waits."""
    tp_group, cp_group = _own_group(groups.tp), _own_group(groups.cp)
    loss = spec.build()
    return [evaluate(loss, piece, groups, tp_group, cp_group) for piece in pieces[dist.get_rank()]]


def evaluate(
    loss: Loss,
    piece: Piece,
    groups: RankGroups,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Outcome:
    """Loss, gradient and metrics of one piece; UserError if it is no [T] loss, or nothing would train."""
    own = _copy(piece)
    leaf = own.policy.requires_grad_()
    if piece.path == "one_pass":
        return _evaluate_in_one_pass(loss, own, groups, tp_group)
    # A model's logits are no leaf: autograd does not keep anyone from writing into them.
    inputs = _inputs(own, leaf.clone(), groups, tp_group, cp_group)
    output = loss(inputs)
    inputs.policy.entropy()  # the engine logs it for every loss
    total = weighted_sum(output.token_loss, piece.batch.token_weight)
    if not total.requires_grad:
        raise UserError(f"loss {loss.name!r}: expected a token_loss with a gradient, got a constant")
    (gradient,) = torch.autograd.grad(total, leaf)
    return Outcome(token_loss=output.token_loss.detach(), gradient=gradient, metrics=output.metrics)


def _evaluate_in_one_pass(
    loss: Loss, piece: Piece, groups: RankGroups, tp_group: dist.ProcessGroup | None
) -> Outcome:
    """A token-local loss sees some tokens at a time, none of them without weight."""

    def distribution(logits: Tensor) -> TokenDistribution:
        return _distribution(logits, groups, tp_group, is_scratch=True)

    def of_tokens(
        policy: TokenDistribution, reference: TokenDistribution | None, batch: TokenBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = loss(LossInputs(policy=policy, reference=reference, batch=batch, is_part=True))
        policy.entropy()
        return output.token_loss, output.metrics

    reference = None if piece.reference is None else _layer_of(piece.reference)
    values = one_pass(of_tokens, _layer_of(piece.policy), reference, piece.batch, distribution)
    (gradient,) = torch.autograd.grad(values.total, piece.policy)
    return Outcome(token_loss=values.token_loss, gradient=gradient, metrics=values.metrics)


def modified_inputs(loss: Loss, piece: Piece, groups: RankGroups) -> list[str]:
    """Names of the inputs that the loss wrote into, in one process, also when that made it fail."""
    own, before = _copy(piece), piece.batch.tensors()
    logits = own.policy.requires_grad_().clone()
    with contextlib.suppress(Exception):
        output = loss(_inputs(own, logits, groups))
        weighted_sum(output.token_loss, own.batch.token_weight).backward()
    return [
        name
        for name, value, earlier in (
            ("policy logits", logits, piece.policy),
            ("reference logits", own.reference, piece.reference),
            *((f"batch.{field}", tensor, before[field]) for field, tensor in own.batch.tensors().items()),
        )
        if value is not None and earlier is not None and not torch.equal(value, earlier)
    ]


def _copy(piece: Piece) -> Piece:
    """The piece in memory of its own: a loss that writes spoils nothing for the next check."""
    return dataclasses.replace(
        piece,
        batch=piece.batch.map(torch.clone),
        policy=piece.policy.clone(),
        reference=None if piece.reference is None else piece.reference.clone(),
    )


def _inputs(
    piece: Piece,
    logits: Tensor,
    groups: RankGroups,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> LossInputs:
    """What the engine hands to a loss."""

    def distribution(columns: Tensor) -> TokenDistribution:
        return _distribution(columns if piece.path == "logits" else _layer_of(columns), groups, tp_group)

    return LossInputs(
        policy=distribution(logits),
        batch=piece.batch,
        reference=None if piece.reference is None else distribution(piece.reference),
        cp_group=cp_group,
    )


def _distribution(
    origin: Tensor | OutputLayer,
    groups: RankGroups,
    tp_group: dist.ProcessGroup | None,
    *,
    is_scratch: bool = False,
) -> TokenDistribution:
    vocab_size, padded = groups.vocab_size, groups.padded_vocab_size
    if isinstance(origin, OutputLayer):
        return TokenDistribution.from_output_layer(
            origin, vocab_size=vocab_size, group=tp_group, padded_vocab_size=padded
        )
    return TokenDistribution.from_logits(
        origin, vocab_size=vocab_size, group=tp_group, padded_vocab_size=padded, is_scratch=is_scratch
    )


def _layer_of(logits: Tensor) -> OutputLayer:
    """An output layer that makes these logits, a few at a time: its hidden states, under the identity."""
    return OutputLayer(
        hidden=logits,
        weight=torch.eye(logits.shape[1], dtype=logits.dtype),
        chunk_bytes=_TOKENS_PER_CHUNK * logits.shape[1] * logits.itemsize,
    )


def _own_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """This rank's group of several; None where there is none. Every rank makes all of them."""
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    return own
