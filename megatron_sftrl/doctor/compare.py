"""The largest difference between what ranks computed and the truth, with the place where it stands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.doctor.case import Case
from megatron_sftrl.doctor.evaluation import Outcome, Piece

SMALLEST_UNIT = 1e-6
"""Where the truth is smaller, it may be rounding alone: PEAR's log weight of a sequence's last token is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a number may be off, in units of the largest true one.

    Args:
        loss: of token losses, and of metrics where they are compared.
        gradient: of the gradient with respect to logits.
        is_per_token: the unit is the token's own loss (at least 1 nat) and the largest gradient of its row.
        metrics: compare metrics, too.
    """

    loss: float
    gradient: float
    is_per_token: bool = False
    metrics: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The largest error of one quantity.

    Args:
        what: "loss", "gradient", "gradient of padding" or a metric.
        token: place in the whole step.
        column: of the vocabulary; None for a quantity of the token.
        rank: that computed it.
        got, expected: values there.
        absolute: how far off; infinite where either is not finite.
        relative: in the tolerance's unit.
        is_wrong: beyond the tolerance.
    """

    what: str
    token: int
    column: int | None
    rank: int
    got: float
    expected: float
    absolute: float
    relative: float
    is_wrong: bool


def largest_differences(
    case: Case,
    truth: Outcome,
    pieces: Sequence[Sequence[Piece]],
    outcomes: Sequence[Sequence[Outcome]],
    tolerance: Tolerance,
) -> list[Difference]:
    """The largest difference of each quantity over all ranks and micro-batches.

    Args:
        case: the step.
        truth: of the whole step, float64.
        pieces, outcomes: of every rank; together they cover the step.
        tolerance: what counts as wrong.
    """
    found: dict[str, Difference] = {}
    for rank, (own_pieces, own_outcomes) in enumerate(zip(pieces, outcomes, strict=True)):
        for piece, outcome in zip(own_pieces, own_outcomes, strict=True):
            for difference in _of_piece(case, truth, piece, outcome, rank, tolerance):
                known = found.get(difference.what)
                if known is None or difference.relative > known.relative:
                    found[difference.what] = difference
    return list(found.values())


def _of_piece(
    case: Case, truth: Outcome, piece: Piece, outcome: Outcome, rank: int, tolerance: Tolerance
) -> Iterator[Difference]:
    mask = case.batch.loss_mask
    per_token = [("loss", outcome.token_loss, truth.token_loss)]
    if tolerance.metrics:
        absent = torch.full_like(truth.token_loss, torch.nan)[piece.rows]
        per_token += [
            (f"metric {name}", outcome.metrics.get(name, absent), value)
            for name, value in truth.metrics.items()
        ]
    is_loss = mask[piece.rows]
    for what, got, expected in per_token:
        expected = torch.where(mask, expected.double(), 0.0)
        unit = expected.abs().clamp(min=1.0) if tolerance.is_per_token else expected.abs().max()
        yield _largest(
            what,
            torch.where(is_loss, got.double(), 0.0)[:, None],
            expected[piece.rows, None],
            unit=unit.expand(mask.numel())[piece.rows, None],
            piece=piece,
            rank=rank,
            tolerance=tolerance.loss,
        )
    columns = slice(piece.first_column, piece.first_column + piece.num_columns)
    rows = truth.gradient.abs().amax(dim=1).maximum(case.batch.token_weight.double())
    unit = rows if tolerance.is_per_token else truth.gradient.abs().max().expand(mask.numel())
    if piece.num_columns:
        yield _largest(
            "gradient",
            outcome.gradient[:, : piece.num_columns].double(),
            truth.gradient[piece.rows, columns],
            unit=unit[piece.rows, None],
            piece=piece,
            rank=rank,
            tolerance=tolerance.gradient,
        )
    padding = outcome.gradient[:, piece.num_columns :].double()
    if padding.numel():
        yield _largest(
            "gradient of padding",
            padding,
            torch.zeros_like(padding),
            unit=unit[piece.rows, None],
            piece=piece,
            rank=rank,
            tolerance=0.0,
        )


def _largest(
    what: str,
    got: Tensor,
    expected: Tensor,
    *,
    unit: Tensor,
    piece: Piece,
    rank: int,
    tolerance: float,
) -> Difference:
    """The entry of two [t, n] arrays with the largest difference in its row's [t, 1] unit."""
    absolute = (got - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    relative = absolute / unit.clamp(min=SMALLEST_UNIT)
    row, column = divmod(int(relative.argmax()), got.shape[1])
    first = piece.first_column + (piece.num_columns if what == "gradient of padding" else 0)
    return Difference(
        what=what,
        token=int(piece.rows[row]),
        column=first + column if what.startswith("gradient") else None,
        rank=rank,
        got=got[row, column].item(),
        expected=expected[row, column].item(),
        absolute=absolute[row, column].item(),
        relative=relative[row, column].item(),
        is_wrong=not relative[row, column].item() <= tolerance,
    )
