"""What must hold for a loss: a table of checks, and how each is carried out.

The truth is the loss itself: in float64, in one process, on the whole vocabulary and the whole step at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sftrl.apps.doctor.case import LENGTHS, Case, Kind, Layout, draw_case, groups_of, pieces_of
from megatron_sftrl.apps.doctor.evaluation import (
    LossSpec,
    Outcome,
    Piece,
    evaluate,
    evaluate_on_rank,
    modified_inputs,
    prepare,
)
from megatron_sftrl.apps.doctor.ranks import RankError, RankPool
from megatron_sftrl.losses.registry import Loss

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
    """The largest error of one quantity, on the rank that computed it.

    Args:
        what: "loss", "gradient", "gradient of padding" or a metric.
        token: place in the whole step.
        column: of the vocabulary; None for a quantity of the token.
        absolute: how far off; infinite where either value is not finite.
        relative: in the tolerance's unit; is_wrong is beyond the tolerance.
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
    """The largest difference of each quantity from the truth, which is of the whole step in float64.

    Pieces and outcomes are those of every rank; together they cover the step.
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


START_S = 300.0
"""Seconds that the workers may take to import torch: on a busy machine much longer than any check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """One loss on one machine.

    Args:
        spec: the loss, for workers.
        seed: of the step that is drawn.
        timeout_s: seconds for one layout of several ranks, which the pool's workers compute.
    """

    spec: LossSpec
    loss: Loss
    seed: int
    pool: RankPool
    timeout_s: float

    def draw(self, kind: Kind = "plain", lengths: Sequence[int] = LENGTHS) -> Case:
        """The step of this seed."""
        return draw_case(self.seed, self.loss.needs, lengths=lengths, kind=kind)

    def here(self, case: Case, layout: Layout) -> list[Outcome]:
        """Every micro-batch of a layout of one rank, in this process."""
        (pieces,) = pieces_of(case, layout)
        return [evaluate(self.loss, piece, groups_of(layout)) for piece in pieces]

    def on_ranks(self, pieces: list[list[Piece]], layout: Layout) -> list[list[Outcome]]:
        """Every micro-batch of every rank; RankError says where each rank stood."""
        self.pool.run(layout.world_size, prepare, self.spec, timeout_s=START_S, group=False)
        return self.pool.run(
            layout.world_size,
            evaluate_on_rank,
            self.spec,
            pieces,
            groups_of(layout),
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Args:
        detail: what was seen, when all is well; else `problems` says what is wrong and where.
        has_raised: the loss itself failed in this process.
    """

    check: str
    detail: str
    problems: tuple[str, ...] = ()
    has_raised: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One property, named for --only and told in a few words; `run` gives what was seen and what is wrong."""

    name: str
    says: str
    run: Callable[[Examination], tuple[str, list[str]]]


def examine(examination: Examination, checks: Sequence[Check]) -> Iterator[Finding]:
    """Carry out the checks in order; none after `output` when the loss gives no answer to compare with."""
    for check in checks:
        finding = _finding(examination, check)
        yield finding
        if check.name == "output" and finding.has_raised:
            return


def _finding(examination: Examination, check: Check) -> Finding:
    try:
        detail, problems = check.run(examination)
    except RankError as error:
        return Finding(check=check.name, detail="", problems=(str(error).rstrip(),))
    except Exception as error:  # the user's function may raise anything
        where = _where_raised(error, examination.loss)
        problem = f"{type(error).__name__}: {error}{where}"
        return Finding(check=check.name, detail="", problems=(problem,), has_raised=True)
    return Finding(check=check.name, detail=detail, problems=tuple(problems))


def _where_raised(error: Exception, loss: Loss) -> str:
    """The last line of the loss's own file that the error passed."""
    file = inspect.getsourcefile(loss.function)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


EXACT = Tolerance(loss=1e-6, gradient=1e-6)
"""float64 over other layouts: only orders of sums differ; a loss may still compute in float32 inside."""
SINGLE = Tolerance(loss=1e-5, gradient=1e-5, metrics=False)
"""float32 against float64 of the same numbers; metrics may jump at a clip."""
HALF = Tolerance(loss=1e-4, gradient=8e-3, metrics=False)
"""bf16 logits against float64 of the same: reductions are float32, the gradient is rounded to 8 bits."""
EXTREME = Tolerance(loss=1e-2, gradient=1e-2, is_per_token=True, metrics=False)
"""float32 holds a log-probability of -1e4 to 1e-3 nats; a difference of two goes through an exp."""


def _inputs_are_kept(examination: Examination) -> tuple[str, list[str]]:
    layout = Layout(dtype=torch.float32)
    ((piece,),) = pieces_of(examination.draw(), layout)
    names = modified_inputs(examination.loss, piece, groups_of(layout))
    problems = [f"{name}: the loss writes into its input; work on a copy" for name in names]
    return "neither logits nor batch are written to", problems


def _output_is_per_token(examination: Examination) -> tuple[str, list[str]]:
    """Shape and dtype are Loss.__call__'s to refuse; numbers are looked at here."""
    case = examination.draw()
    (outcome,) = examination.here(case, Layout(dtype=torch.float32))
    seen = f"one finite loss a token; {len(outcome.metrics)} metrics, finite"
    return seen, _not_finite("float32", case, outcome)


def _weights_are_not_read(examination: Examination) -> tuple[str, list[str]]:
    """Other weights leave token_loss as it was: the sum over the step is taken behind the loss."""
    case = examination.draw()
    batch = dataclasses.replace(case.batch, token_weight=3 * case.batch.token_weight)
    (truth,) = examination.here(case, Layout())
    (other,) = examination.here(dataclasses.replace(case, batch=batch), Layout())
    as_expected = dataclasses.replace(truth, gradient=3 * truth.gradient)
    pieces = pieces_of(case, Layout())
    differences = largest_differences(case, as_expected, pieces, [[other]], EXACT)
    return _judged("token_weight tripled", case, differences)


def _empty_mask(examination: Examination) -> tuple[str, list[str]]:
    case = examination.draw("no_loss")
    (outcome,) = examination.here(case, Layout(dtype=torch.float32))
    bad = (outcome.gradient != 0).nonzero()  # NaN, too
    problems = []
    if len(bad):
        token, column = bad[0].tolist()
        problems = [
            f"the gradient of a batch without loss tokens at {_token(case, token)}, column {column}: "
            f"got {outcome.gradient[token, column].item():g}, expected exactly 0"
        ]
    return "gradient exactly 0", problems


def _over(
    *layouts: Layout, tolerance: Tolerance = EXACT, kind: Kind = "plain", lengths: Sequence[int] = LENGTHS
) -> Callable[[Examination], tuple[str, list[str]]]:
    """A check that these layouts give the truth, value and gradient."""

    def run(examination: Examination) -> tuple[str, list[str]]:
        case = examination.draw(kind, lengths)
        differences, problems = [], []
        for layout in layouts:
            if layout.path == "one_pass" and not examination.loss.is_token_local:
                continue
            rounded = case.rounded(layout.dtype)
            (truth,) = examination.here(rounded, Layout())
            if unusable := _not_finite("one process, float64", rounded, truth):
                return "", unusable
            pieces = pieces_of(rounded, layout)
            if layout.world_size > 1:
                outcomes = examination.on_ranks(pieces, layout)
            else:
                outcomes = [examination.here(rounded, layout)]
            found = largest_differences(rounded, truth, pieces, outcomes, tolerance)
            differences += found
            problems += _judged(str(layout), case, found)[1]
        return _judged("", case, differences)[0], problems

    return run


def _not_finite(layout: str, case: Case, outcome: Outcome) -> list[str]:
    """A sentence for each quantity with NaN or infinity; where there is no loss, only the gradient counts."""
    mask = case.batch.loss_mask
    rows = {
        "gradient": (outcome.gradient.sum(dim=1), torch.ones_like(mask)),
        "loss": (outcome.token_loss, mask),
    }
    rows |= {f"metric {name}": (value, mask) for name, value in outcome.metrics.items()}
    problems = []
    for what, (value, counts) in rows.items():
        bad = (~torch.isfinite(value) & counts).nonzero().flatten().tolist()
        if bad:
            problems.append(
                f"{layout}: {what} at {_token(case, bad[0])}: got {value[bad[0]].item()}, expected a finite "
                f"number; so at {len(bad)} tokens"
            )
    return problems


def _judged(layout: str, case: Case, differences: Sequence[Difference]) -> tuple[str, list[str]]:
    """(largest relative errors, a sentence for each that is wrong)."""
    largest = {
        what: max(difference.relative for difference in differences if difference.what == what)
        for what in ("loss", "gradient")
    }
    problems = []
    for found in differences:
        if found.is_wrong:
            column = "" if found.column is None else f", column {found.column}"
            problems.append(
                f"{layout}: {found.what} at {_token(case, found.token)}{column}, on rank {found.rank}: "
                f"got {found.got:.9g}, expected {found.expected:.9g}, off by {found.absolute:.1e}, "
                f"{found.relative:.1e} of its scale"
            )
    return f"loss within {largest['loss']:.1e}, gradient within {largest['gradient']:.1e}", problems


def _token(case: Case, token: int) -> str:
    sequence = int(torch.bucketize(token, case.batch.cu_seqlens[1:], right=True))
    place = int(case.batch.positions[token])
    return f"token {token} (sequence {sequence}, position {place})"


_NUM = len(LENGTHS)
_ONES = (1,) * _NUM
CHECKS = (
    Check(name="inputs", says="the loss writes into no input", run=_inputs_are_kept),
    Check(name="output", says="one finite number per token, not reduced", run=_output_is_per_token),
    Check(name="weights", says="token_weight is left to the engine", run=_weights_are_not_read),
    Check(name="empty-mask", says="a batch without loss tokens trains nothing", run=_empty_mask),
    Check(
        name="one-token",
        says="sequences of one token",
        run=_over(Layout(microbatches=_NUM), Layout(dtype=torch.float32), tolerance=SINGLE, lengths=_ONES),
    ),
    Check(
        name="microbatches",
        says="cut into 2 and 3 micro-batches: nothing is divided by a local count",
        run=_over(Layout(microbatches=2), Layout(microbatches=3)),
    ),
    Check(
        name="packing",
        says="one sequence at a time, and packed in another order",
        run=_over(Layout(microbatches=_NUM), Layout(is_reversed=True)),
    ),
    Check(
        name="padding",
        says="padded columns of the vocabulary, 1e30 and -inf",
        run=_over(Layout(padding="huge"), Layout(padding="-inf")),
    ),
    Check(
        name="float32",
        says="float32 logits against float64",
        run=_over(Layout(dtype=torch.float32), tolerance=SINGLE),
    ),
    Check(
        name="bf16",
        says="bf16 logits against float64 of the same numbers",
        run=_over(Layout(dtype=torch.bfloat16), tolerance=HALF),
    ),
    Check(
        name="extreme",
        says="logits of +-1e4, impossible labels, -inf in padded columns",
        run=_over(
            Layout(padding="-inf", dtype=torch.float32),
            Layout(tp=2, padding="-inf", dtype=torch.float32),
            tolerance=EXTREME,
            kind="extreme",
        ),
    ),
    Check(
        name="tp2",
        says="vocabulary over 2 ranks, padded with 1e30",
        run=_over(Layout(tp=2, padding="huge"), Layout(tp=2, padding="heavy")),
    ),
    Check(
        name="tp3",
        says="vocabulary over 3 ranks, padded with 1e30",
        run=_over(Layout(tp=3, padding="huge"), Layout(tp=3, padding="heavy")),
    ),
    Check(
        name="fused",
        says="logits made by the output layer, in one pass when the loss is declared token_local",
        run=_over(
            Layout(path="two_passes"),
            Layout(path="one_pass"),
            Layout(tp=2, padding="huge", path="two_passes"),
            Layout(tp=2, padding="huge", path="one_pass"),
        ),
    ),
    Check(
        name="pp2",
        says="only the last pipeline stage meets the loss",
        run=_over(Layout(pp=2, microbatches=2)),
    ),
    Check(name="dp2", says="sequences over 2 ranks", run=_over(Layout(dp=2, microbatches=2))),
    Check(name="cp2", says="each sequence over 2 ranks", run=_over(Layout(cp=2, microbatches=2))),
    Check(
        name="tp2-cp2",
        says="vocabulary and sequences over 4 ranks",
        run=_over(Layout(tp=2, cp=2, microbatches=2, padding="huge")),
    ),
)
