"""Carries out checks on one loss and collects what they found."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_sftrl.doctor.case import LENGTHS, Case, Kind, draw_case
from megatron_sftrl.doctor.evaluation import LossSpec, Outcome, Piece, evaluate, evaluate_on_rank, prepare
from megatron_sftrl.doctor.layouts import Layout, groups_of, pieces_of
from megatron_sftrl.doctor.ranks import RankError, RankPool
from megatron_sftrl.losses.registry import Loss

START_S = 300.0
"""Seconds that the workers may take to import torch: on a busy machine much longer than any check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """One loss on one machine.

    Args:
        spec: the loss, for workers.
        loss: the same, built.
        seed: of the step that is drawn.
        pool: workers for layouts of several ranks.
        timeout_s: seconds for one layout of several ranks.
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
        check: its name.
        detail: what was seen, when all is well.
        problems: what is wrong and where; empty when all is well.
        has_raised: the loss itself failed in this process.
    """

    check: str
    detail: str
    problems: tuple[str, ...] = ()
    has_raised: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One property.

    Args:
        name: for --only.
        says: the property, in a few words.
        run: gives what was seen and what is wrong.
    """

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
