"""Cuts a step over the ranks of every parallel axis and over micro-batches, as the engine does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sftrl.doctor.case import VOCAB_SIZE, Case
from megatron_sftrl.doctor.evaluation import LogitsPath, Piece, RankGroups
from megatron_sftrl.engine.context_parallel import local_rows, shard_for_context_parallel

Padding = Literal["none", "huge", "-inf", "heavy"]
_PADDING_VALUES = {"none": 0.0, "huge": 1e30, "-inf": -torch.inf, "heavy": 1e30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the step is spread.

    Args:
        tp, pp, cp, dp: ranks on each axis; tp runs fastest, then cp, dp, pp.
        microbatches: parts that each data-parallel rank's sequences are cut into, at most one a sequence.
        is_reversed: sequences are packed last first.
        padding: what stands in the padded columns of the vocabulary; `heavy` are so many that the last rank
            of several holds nothing else.
        dtype: of the logits.
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
    rows = rows[local_rows(batch.cu_seqlens, cp_rank=cp_rank, cp_size=layout.cp)]
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
