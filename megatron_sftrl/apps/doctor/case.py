"""What a loss is examined on: one step of packed sequences with logits, drawn from a seed.

Everything is float32, so that an evaluation in float32 and one in float64 start from the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_sftrl.apps.doctor.evaluation import LogitsPath, Piece, RankGroups
from megatron_sftrl.engine.context_parallel import local_rows, shard_for_context_parallel
from megatron_sftrl.losses.api import token_weights
from megatron_sftrl.types import TokenBatch

VOCAB_SIZE = 1031
"""Prime, so that no number of ranks divides it, and above CurioSFT's top 512 on each of two ranks."""
LENGTHS = (8, 4, 16, 4, 12, 8)
"""Multiples of 4: context parallelism of size 2 halves each sequence twice."""
HUGE = 1e4
"""A logit beyond which exp(z), and any sum of squares in float16, is long infinite."""

Kind = Literal["plain", "extreme", "no_loss"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One step: its sequences with what the loss needs, and [T, V] float32 logits without padding."""

    batch: TokenBatch
    policy: Tensor
    reference: Tensor | None

    def rounded(self, dtype: torch.dtype) -> Case:
        """The same step with logits that `dtype` can hold, still float32."""
        reference = None if self.reference is None else self.reference.to(dtype).float()
        return replace(self, policy=self.policy.to(dtype).float(), reference=reference)

    def rows_of(self, sequences: Sequence[int]) -> Tensor:
        """[t] int64, the tokens of some sequences, in the order of the sequences given."""
        starts = self.batch.cu_seqlens.tolist()
        return torch.cat([torch.arange(starts[s], starts[s + 1]) for s in sequences])

    def packed(self, sequences: Sequence[int]) -> TokenBatch:
        """Some of the sequences, packed in this order; weights stay those of the whole step."""
        rows = self.rows_of(sequences)
        lengths = self.batch.cu_seqlens.diff()[list(sequences)]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths]).cumsum(0).to(torch.int32)
        return self.batch.map(lambda value: value[rows], cu_seqlens=cu_seqlens)


def draw_case(
    seed: int, needs: Sequence[str], *, lengths: Sequence[int] = LENGTHS, kind: Kind = "plain"
) -> Case:
    """A step whose labels are sometimes likely and sometimes not.

    The loss is given what it declares to need and nothing else. `extreme` has rows near +-1e4, and labels
    that are all but certain or all but impossible; `no_loss` masks every token.
    """
    draw = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    labels = torch.randint(VOCAB_SIZE, (num_tokens,), generator=draw)
    policy = 2 * noise(num_tokens, VOCAB_SIZE)
    policy[torch.arange(num_tokens), labels] += 4 + 3 * noise(num_tokens)
    reference = policy + noise(num_tokens, VOCAB_SIZE)
    if kind == "extreme":
        _make_extreme(policy, labels)
        _make_extreme(reference, labels)
    logprobs = policy.double().log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    # Near and far from the policy, on both sides: clips and masks of the loss act on some tokens.
    old = (logprobs + 0.15 * noise(num_tokens)).float()
    fields: dict[str, Any] = {
        "behavior_logprobs": (logprobs - 0.1 + 0.4 * noise(num_tokens)).float(),
        "old_logprobs": old,
        "rollout_logprobs": old + 0.3 * noise(num_tokens),
        "advantages": noise(num_tokens),
    }
    batch = TokenBatch(
        tokens=torch.randint(VOCAB_SIZE, (num_tokens,), generator=draw),
        labels=labels,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=torch.zeros(num_tokens, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        token_weight=torch.zeros(num_tokens),
        **{name: value for name, value in fields.items() if name in needs},
    )
    if kind != "no_loss":
        batch = _with_loss(batch, torch.rand(num_tokens, generator=draw) < 0.8)
    return Case(batch=batch, policy=policy, reference=reference if "reference" in needs else None)


def _with_loss(batch: TokenBatch, drawn: Tensor) -> TokenBatch:
    """Loss on the drawn tokens behind each sequence's first half or third, none on the fourth sequence."""
    lengths = batch.cu_seqlens.diff().tolist()
    prompts = torch.cat([torch.arange(length) < length // 3 for length in lengths])
    mask = drawn & ~prompts
    starts = batch.cu_seqlens.tolist()
    for sequence in range(batch.num_sequences):
        mask[starts[sequence + 1] - 1] = sequence != 3  # the end token: no sequence but the fourth is empty
    if batch.num_sequences > 3:
        mask[starts[3] : starts[4]] = False
    weight = token_weights(
        mask,
        batch.cu_seqlens,
        "sequence_mean",
        num_loss_tokens=int(mask.sum()),
        num_sequences=sum(bool(part.any()) for part in mask.split(lengths)),
        max_length=max(lengths),
    )
    return replace(batch, loss_mask=mask, token_weight=weight)


def _make_extreme(logits: Tensor, labels: Tensor) -> None:
    """Rows in turn: as they are, near +1e4, near -1e4, a certain label, an impossible label."""
    kinds = torch.arange(labels.numel()) % 5
    tokens = torch.arange(labels.numel())
    logits[kinds == 1] += HUGE
    logits[kinds == 2] -= HUGE
    certain, impossible = tokens[kinds == 3], tokens[kinds == 4]
    logits[certain, labels[certain]] = HUGE
    logits[impossible, labels[impossible]] = -HUGE


Padding = Literal["none", "huge", "-inf", "heavy"]
_PADDING_VALUES = {"none": 0.0, "huge": 1e30, "-inf": -torch.inf, "heavy": 1e30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the step is spread over the ranks of every axis and over micro-batches, as the engine does it.

    Args:
        tp, pp, cp, dp: ranks on each axis; tp runs fastest, then cp, dp, pp.
        microbatches: parts that each data-parallel rank's sequences are cut into, at most one a sequence.
        is_reversed: sequences are packed last first.
        padding: what stands in the padded columns of the vocabulary; `heavy` are so many that the last rank
            of several holds nothing else.
        path: how the loss gets them.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    microbatches: int = 1
    is_reversed: bool = False
    padding: Padding = "none"
    dtype: torch.dtype = torch.float64
    path: LogitsPath = "logits"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def width(self) -> int:
        """V_local, padding included."""
        if self.padding == "heavy" and self.tp > 1:
            return -(-VOCAB_SIZE // (self.tp - 1))
        return -(-VOCAB_SIZE // self.tp) + (0 if self.padding == "none" else 3)

    def __str__(self) -> str:
        axes = [f"{name} {size}" for name in ("tp", "pp", "cp", "dp") if (size := getattr(self, name)) > 1]
        parts = [*axes, *([f"{self.microbatches} micro-batches"] if self.microbatches > 1 else [])]
        parts += ["packed in reverse"] if self.is_reversed else []
        parts += [f"padding {self.padding}"] if self.padding != "none" else []
        parts += [str(self.dtype).removeprefix("torch.")]
        parts += [] if self.path == "logits" else [f"fused in {self.path.replace('_', ' ')}"]
        return ", ".join(parts)


def groups_of(layout: Layout) -> RankGroups:
    """Which ranks share a vocabulary and which share sequences; no group for an axis of one."""
    world = torch.arange(layout.world_size).view(layout.pp, layout.dp, layout.cp, layout.tp)
    tp = world.reshape(-1, layout.tp) if layout.tp > 1 else world[:0].reshape(0, 1)
    cp = world.transpose(2, 3).reshape(-1, layout.cp) if layout.cp > 1 else world[:0].reshape(0, 1)
    return RankGroups(
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=layout.width * layout.tp,
        tp=tuple(map(tuple, tp.tolist())),
        cp=tuple(map(tuple, cp.tolist())),
    )


def pieces_of(case: Case, layout: Layout) -> list[list[Piece]]:
    """The micro-batches of every rank; none before the last pipeline stage, which alone computes a loss."""
    stages = layout.world_size // layout.pp
    pieces: list[list[Piece]] = [[] for _ in range(layout.world_size - stages)]
    for rank in range(stages):
        tp_rank = rank % layout.tp
        cp_rank = rank // layout.tp % layout.cp
        dp_rank = rank // (layout.tp * layout.cp)
        sequences = list(range(dp_rank, case.batch.num_sequences, layout.dp))
        if layout.is_reversed:
            sequences.reverse()
        parts = _parts(sequences, layout.microbatches)
        pieces.append([_piece(case, part, layout, tp_rank=tp_rank, cp_rank=cp_rank) for part in parts])
    return pieces


def _parts(sequences: Sequence[int], count: int) -> list[list[int]]:
    """Neighbours together, in `count` parts as even as can be."""
    assert 1 <= count <= len(sequences), "every micro-batch holds a sequence"
    bounds = [round(i * len(sequences) / count) for i in range(count + 1)]
    return [list(sequences[a:b]) for a, b in itertools.pairwise(bounds)]


def _piece(case: Case, sequences: Sequence[int], layout: Layout, *, tp_rank: int, cp_rank: int) -> Piece:
    batch, rows = case.packed(sequences), case.rows_of(sequences)
    rows = rows[local_rows(batch.lengths(), cp_rank=cp_rank, cp_size=layout.cp)]
    first = min(tp_rank * layout.width, VOCAB_SIZE)
    last = min(first + layout.width, VOCAB_SIZE)

    def columns(logits: Tensor) -> Tensor:
        shard = torch.full((rows.numel(), layout.width), _PADDING_VALUES[layout.padding], dtype=layout.dtype)
        shard[:, : last - first] = logits[rows, first:last]
        return shard

    return Piece(
        batch=shard_for_context_parallel(batch, cp_rank=cp_rank, cp_size=layout.cp),
        rows=rows,
        first_column=first,
        num_columns=last - first,
        policy=columns(case.policy),
        reference=None if case.reference is None else columns(case.reference),
        path=layout.path,
    )
