"""`sftrl sft`: supervised fine-tuning with any registered loss."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.data.dataset import Dataset, RowsToTokenize, find_rows
from megatron_sftrl.data.loader import StepData, StepLoader, num_training_steps
from megatron_sftrl.data.mixture import Mixture, describe_mixture, plan_mixture, with_mixture
from megatron_sftrl.data.rows import scorer_warnings
from megatron_sftrl.engine.objective import StepReport, combine_reports
from megatron_sftrl.engine.optimizer import OptimStep
from megatron_sftrl.engine.parallel import ParallelContext, run_context
from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.run_directory import RunDirectory, open_run_directory
from megatron_sftrl.observability.watch import HangWatch
from megatron_sftrl.trainers.checked import CheckedRun, batch_layout, checked_run
from megatron_sftrl.trainers.guards import tell_skipped
from megatron_sftrl.trainers.run import Run, StopRequest, hold, shared_progress

LOGGER = logging.getLogger(__name__)

# The data of an SFT run: training and validation steps by number.


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrations:
    """What the loop asks the data for.

    Args:
        train: steps of training data.
        valid: steps that cover the held-out data once; None without data.valid.
        num_steps: optimizer steps of the whole run.
        mixture: what an epoch takes of each path of data.train; None where it takes all rows.
    """

    train: StepLoader
    valid: StepLoader | None
    num_steps: int
    dataset: Dataset
    mixture: Mixture | None

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self.dataset) if self.mixture is None else self.mixture.num_rows

    @property
    def fingerprint(self) -> str:
        """Equal means that a run goes on with the same samples."""
        return with_mixture(self.dataset.fingerprint, self.mixture)

    def describe(self, row: int) -> str:
        """Where a training row comes from."""
        return self.dataset.describe(row)


def open_demonstrations(
    checked: CheckedRun[RunConfig], directory: RunDirectory, parallel: ParallelContext
) -> Demonstrations:
    """Tokenize everything once, into the run directory, and lay out the steps.

    Raises:
        UserError: a row that cannot be used, or a loss that needs scores the data has not.
    """
    config = checked.config
    sets = (True, False) if config.data.valid else (True,)
    rows = on_every_rank(lambda: [_rows(checked, directory, is_train=each) for each in sets])
    tokenize_once(rows, parallel, hang_minutes=config.train.hang_minutes)
    train, valid = (rows[0].load(), rows[1].load() if config.data.valid else None)
    if "behavior_logprobs" in checked.loss.needs:
        for name, dataset in (("train", train), ("valid", valid)):
            if dataset is not None and not dataset.has_behavior_logprobs:
                raise UserError(
                    f"loss {checked.loss.name!r} needs behavior_logprobs, but data.{name} has none: "
                    "score it with `sftrl score`"
                )
            for line in scorer_warnings(dataset.scorers if dataset else (), dtype=config.model.dtype):
                if parallel.rank == 0:
                    LOGGER.warning("data.%s: %s", name, line)
    mixture = _mixture(config, train)
    steps = num_training_steps(
        steps=config.train.steps,
        epochs=config.train.epochs,
        num_rows=len(train) if mixture is None else mixture.num_rows,
        global_size=config.batch.global_size,
    )
    return Demonstrations(
        train=_loader(checked, train, parallel, is_train=True, mixture=mixture),
        valid=_loader(checked, valid, parallel, is_train=False) if valid is not None else None,
        num_steps=steps,
        dataset=train,
        mixture=mixture,
    )


def _mixture(config: RunConfig, train: Dataset) -> Mixture | None:
    """What an epoch takes of each path of data.train, told in the log; None where it takes all rows."""
    data = config.data
    if data.train_weights is None:
        return None
    paths, sources = data.train_paths, train.sources
    counts, unit = np.ones(len(train), np.int64), "rows"
    if data.mix_by == "tokens":
        counts, unit = train.num_loss_tokens, "learned tokens"
    sizes = np.bincount(sources, minlength=len(paths))
    amounts = np.bincount(sources, weights=counts, minlength=len(paths))
    mixture = plan_mixture(data.train_weights, sizes=sizes.tolist(), amounts=amounts.tolist(), paths=paths)
    first = np.concatenate(mixture.rows_of_sources(0, seed=config.seed, shuffle=data.shuffle))
    LOGGER.info("data.train: %s", describe_mixture(mixture, counts[first], unit, paths))
    return mixture


def tokenize_once(rows: Sequence[RowsToTokenize], parallel: ParallelContext, *, hang_minutes: float) -> None:
    """Fill the caches of `rows`, a share of the files on each node; every rank calls it.

    Ranks that wait do so at the job's store, not in a collective: as long as a rank that tokenizes goes on,
    nothing ends them. A set that is finished, or a node's share of one, is found by the next start.

    Raises:
        UserError, RuntimeError: on every rank, with the text of each rank that raised.
    """
    local_ranks = [0] * parallel.world_size
    dist.all_gather_object(local_ranks, int(os.environ.get("LOCAL_RANK", "0")))
    leaders = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
    with HangWatch(hang_minutes) as watch:
        progress = shared_progress(parallel, watch, hang_minutes=hang_minutes)

        def tokenize_share() -> None:
            for each in rows if parallel.rank in leaders else ():
                each.write_part(leaders.index(parallel.rank), len(leaders), progress.moved)

        def join_shares() -> None:
            for each in rows if parallel.rank == 0 else ():
                each.load(num_parts=len(leaders), on_move=progress.moved)

        on_every_rank(lambda: progress.together(tokenize_share))
        on_every_rank(lambda: progress.together(join_shares))


def _rows(checked: CheckedRun[RunConfig], directory: RunDirectory, *, is_train: bool) -> RowsToTokenize:
    data = checked.config.data
    return find_rows(
        data.train_paths if is_train else data.valid,
        checked.tokenizer,
        max_length=data.max_length,
        truncation=data.truncation,
        columns=data.columns,
        learning=data.learning,
        cache_dir=directory.path / "tokens",
        key="data.train" if is_train else "data.valid",
    )


def _loader(
    checked: CheckedRun[RunConfig],
    dataset: Dataset,
    parallel: ParallelContext,
    *,
    is_train: bool,
    mixture: Mixture | None = None,
) -> StepLoader:
    config = checked.config
    return StepLoader(
        dataset,
        batch=config.batch,
        layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
        max_length=config.data.max_length,
        pad_id=checked.tokenizer.pad_id,
        seed=config.seed,
        shuffle=config.data.shuffle,
        mode="train" if is_train else "evaluate",
        mixture=mixture,
    )


def run_sft(config: RunConfig) -> bool:
    """Train as the configuration says; a run directory that holds this run's checkpoints is resumed.

    Returns:
        The run is finished; False when a signal stopped it, with a checkpoint.
    Raises:
        UserError: something that the user can fix, found before anything is built or overwritten; later only
            a full disk, a gate that stops, or too many steps in a row without a finite gradient. All else
            that can be raised is a failure (what a loss of the user's raises, too): the same command goes on
            from the last checkpoint.
    """
    checked = checked_run(config)
    with (
        StopRequest() as stop,
        run_context(config) as parallel,
    ):
        directory = open_run_directory(config, is_writer=False)
        with hold(directory):
            data = open_demonstrations(checked, directory, parallel)
            run = Run(
                checked,
                directory,
                parallel,
                stop,
                num_steps=data.num_steps,
                fingerprint=data.fingerprint,
                columns="tokens, masks, scores or weights",
                held_out=() if data.valid is None else None,
            )
            run.begin()
            is_finished = SftTrainer(run, data).train()
    run.tell_end()
    return is_finished


class SftTrainer:
    def __init__(self, run: Run[RunConfig], data: Demonstrations) -> None:
        self.run, self.data = run, data

    def train(self) -> bool:
        """Steps with evaluations and checkpoints between them, until the end (True) or a request to stop."""
        run = self.run
        with run.recorded():
            while run.goes_on:
                data, report, update = self._step()
                held_out = self.evaluate() if run.is_evaluation_due else {}
                numbers = {**self._numbers(data, report, update), **held_out}
                on_rank_zero(partial(run.write, numbers))
                suspects = self._suspects(data, report)
                tell_skipped(int(update.is_skipped), step=run.state.step, suspects=suspects)
                run.end_step(numbers, suspects=suspects, is_whole=data.num_loss_tokens > 0)
        return run.is_finished

    def _step(self) -> tuple[StepData, StepReport, OptimStep]:
        """One update of the policy on the run's next batch."""
        run, step = self.run, self.run.state.step
        with run.timers("data"):
            data = self.data.train.step(step)
        with run.timers("forward_backward"):
            report = run.policy.forward_backward(data.batches, run.loss, run.reference)
        with run.timers("optimizer"):
            update = run.optimize(step, report)
        with run.timers("reference"):
            run.follow(steps_done=step + 1)
        consumed = run.state.consumed_samples + data.num_sequences
        run.state = replace(run.state, step=step + 1, consumed_samples=consumed)
        if data.num_loss_tokens > 0:
            run.check_learning(report, grad_norm=update.grad_norm, step=step + 1)
        return data, report, update

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss and its metrics over all of data.valid, each under valid/."""
        run, valid = self.run, self.data.valid
        if valid is None:
            return {}
        with run.timers("evaluate"):
            reports = [
                run.policy.evaluate(valid.step(step).batches, run.loss, run.reference)
                for step in range(valid.num_evaluation_steps)
            ]
        whole = combine_reports(reports, loss_name=run.loss.name)
        return {f"valid/{name}": value for name, value in {"loss": whole.loss, **whole.metrics}.items()}

    def _suspects(self, data: StepData, report: StepReport) -> list[str]:
        """Where the samples of micro-batches come from whose loss is not finite; else those of the step."""
        rows = [
            row
            for dp_rank, microbatch in report.nonfinite_microbatches
            for row in data.microbatch_rows[dp_rank][microbatch]
        ]
        return [self.data.describe(row) for row in rows or data.rows]

    def _numbers(self, data: StepData, report: StepReport, update: OptimStep) -> dict[str, float]:
        seconds = self.run.timers.collect()
        busy = sum(seconds[phase] for phase in ("data", "forward_backward", "optimizer", "reference"))
        return {
            "loss": report.loss,
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "tokens": data.num_tokens,
            "loss_tokens": data.num_loss_tokens,
            "tokens_per_second": data.num_tokens / busy,
            "padding_share": 1.0 - data.num_tokens / data.num_padded_tokens,
            "epoch": self.run.state.consumed_samples / self.data.num_rows,
            **report.metrics,
            **self.run.numbers(seconds),
        }
