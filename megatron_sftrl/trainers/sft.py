"""`sftrl sft`: supervised fine-tuning with any registered loss."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.data.dataset import Dataset, load_dataset
from megatron_sftrl.data.loader import StepData, StepLoader, num_training_steps
from megatron_sftrl.data.rows import scorer_warnings
from megatron_sftrl.engine.checkpoint import CheckpointStore
from megatron_sftrl.engine.objective import StepReport, combine_reports
from megatron_sftrl.engine.optimizer import OptimStep
from megatron_sftrl.engine.parallel import ParallelContext, parallel_context
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.run_directory import RunDirectory, open_run_directory
from megatron_sftrl.observability.watch import HangWatch, Timers, peak_memory_bytes
from megatron_sftrl.trainers.checked import RunPlan, batch_layout, export_assets, plan_run
from megatron_sftrl.trainers.guards import (
    Crossing,
    Gates,
    no_gradient_warning,
    stop_at,
    stop_on_nonfinite_streak,
    tell,
    tell_skipped,
)
from megatron_sftrl.trainers.origins import Origins
from megatron_sftrl.trainers.run import (
    StopRequest,
    Stragglers,
    begin_run,
    build_models,
    follow,
    hold,
    metrics_on_rank_zero,
    resume_or_start,
    save_numbers,
)

# The data of an SFT run: training and validation steps by number.


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrations:
    """What the loop asks the data for.

    Args:
        train: steps of training data.
        valid: steps that cover the held-out data once; None without data.valid.
        num_steps: optimizer steps of the whole run.
        dataset: the training rows.
    """

    train: StepLoader
    valid: StepLoader | None
    num_steps: int
    dataset: Dataset

    @property
    def num_rows(self) -> int:
        """Rows of the training data."""
        return len(self.dataset)

    def describe(self, row: int) -> str:
        """Where a training row comes from."""
        return self.dataset.describe(row)


def open_demonstrations(
    plan: RunPlan[RunConfig], directory: RunDirectory, parallel: ParallelContext
) -> Demonstrations:
    """Tokenize everything once (rank 0, kept in the run directory) and lay out the steps.

    Raises:
        UserError: a row that cannot be used, or a loss that needs scores the data has not.
    """
    config = plan.config

    def load() -> tuple[Dataset, Dataset | None]:
        train = _load(plan, directory, is_train=True)
        valid = _load(plan, directory, is_train=False) if config.data.valid else None
        return train, valid

    # Rank 0 comes first and the others find its work in the cache; a bad row is an error on all of them.
    on_rank_zero(lambda: load() and None)
    train, valid = load()
    if "behavior_logprobs" in plan.loss.needs:
        for name, dataset in (("train", train), ("valid", valid)):
            if dataset is not None and not dataset.has_behavior_logprobs:
                raise UserError(
                    f"loss {plan.loss.name!r} needs behavior_logprobs, but data.{name} has none: "
                    "score it with `sftrl score`"
                )
            for line in scorer_warnings(dataset.scorers if dataset else (), dtype=config.model.dtype):
                if parallel.rank == 0:
                    print(f"warning: data.{name}: {line}", file=sys.stderr, flush=True)
    steps = num_training_steps(
        steps=config.train.steps,
        epochs=config.train.epochs,
        num_rows=len(train),
        global_size=config.batch.global_size,
    )
    return Demonstrations(
        train=_loader(plan, train, parallel, is_train=True),
        valid=_loader(plan, valid, parallel, is_train=False) if valid is not None else None,
        num_steps=steps,
        dataset=train,
    )


def _load(plan: RunPlan[RunConfig], directory: RunDirectory, *, is_train: bool) -> Dataset:
    data = plan.config.data
    return load_dataset(
        data.train if is_train else data.valid,
        plan.tokenizer,
        max_length=data.max_length,
        truncation=data.truncation,
        cache_dir=directory.path / "tokens",
        key="data.train" if is_train else "data.valid",
    )


def _loader(
    plan: RunPlan[RunConfig], dataset: Dataset, parallel: ParallelContext, *, is_train: bool
) -> StepLoader:
    config = plan.config
    return StepLoader(
        dataset,
        batch=config.batch,
        layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
        max_length=config.data.max_length,
        pad_id=plan.tokenizer.pad_id,
        seed=config.seed,
        shuffle=config.data.shuffle,
        mode="train" if is_train else "evaluate",
    )


def run_sft(config: RunConfig) -> bool:
    """Train as the configuration says; a run directory that holds this run's checkpoints is resumed.

    Returns:
        The run is finished; False when a signal stopped it, with a checkpoint.
    Raises:
        UserError: something that the user can fix, found before anything is built or overwritten; later
            only a full disk, a gate that stops, or too many steps in a row without a finite gradient. All
            else that can be raised is a failure (what a loss of the user's raises, too): the same command
            goes on from the last checkpoint.
    """
    plan = plan_run(config)
    with (
        StopRequest() as stop,
        parallel_context(config.parallel, hang_minutes=config.train.hang_minutes) as parallel,
    ):
        directory = open_run_directory(config, is_writer=False)
        with hold(directory):
            demonstrations = open_demonstrations(plan, directory, parallel)
            trainer = SftTrainer(plan, directory, demonstrations, parallel)
            # Only now: who corrects a bad row, max_length or init_checkpoint shall not meet the resolved.yaml
            # of a run that never began, and be refused as another run.
            on_rank_zero(lambda: begin_run(config, trainer.origins))
            return trainer.train(stop)


class SftTrainer:
    """Owns the models and the state of one run; `train` is the loop."""

    def __init__(
        self,
        plan: RunPlan[RunConfig],
        directory: RunDirectory,
        demonstrations: Demonstrations,
        parallel: ParallelContext,
    ) -> None:
        self.config = plan.config
        self.loss = plan.loss
        self.directory = directory
        self.data = demonstrations
        self.parallel = parallel
        self.watch = HangWatch(self.config.train.hang_minutes)
        self.store = CheckpointStore(
            directory.checkpoints,
            parallel,
            keep_last=plan.config.checkpoint.keep_last,
            assets=export_assets(plan),
            async_save=plan.config.checkpoint.async_save,
            on_progress=self.watch.moved,
        )
        is_resumed = self.store.latest() is not None
        self.origins = Origins(directory, is_resumed=is_resumed)
        self.policy, self.reference = build_models(plan, parallel, self.origins, is_resumed=is_resumed)
        self.policy.on_microbatch = self.watch.moved
        self.state = resume_or_start(
            self.store,
            self.policy,
            self.reference,
            fingerprint=demonstrations.dataset.fingerprint,
            columns="tokens, masks or scores",
        )
        self.gates = Gates(
            plan.config.gates,
            defaults=plan.loss.config.default_gates(),
            held_out=() if demonstrations.valid is None else None,
        )
        self.stragglers = Stragglers(self.policy, parallel)
        self._is_learning_checked = False
        is_cuda = parallel.device.type == "cuda"
        self.timers = Timers(synchronize=torch.cuda.synchronize if is_cuda else None, on_end=self.watch.moved)

    def train(self, stop: StopRequest) -> bool:
        """Steps with evaluations and checkpoints between them, until the end (True) or a request to stop."""
        num_steps = self.data.num_steps
        with (
            metrics_on_rank_zero(
                self.directory, self.config, self.parallel, resume_step=self.state.step, total_steps=num_steps
            ) as metrics,
            self.watch,
            self.store,
        ):
            while self.state.step < num_steps:
                step = self.state.step
                with self.timers("data"):
                    data = self.data.train.step(step)
                with self.timers("forward_backward"):
                    report = self.policy.forward_backward(data.batches, self.loss, self.reference)
                with self.timers("optimizer"):
                    update = self.policy.optim_step(step, num_steps=num_steps, loss=report.loss)
                with self.timers("reference"):
                    follow(self.policy, self.reference, steps_done=step + 1)
                self._advance(data, update)
                self._warn_once(data, report, update)
                held_out = self.evaluate() if self._is_due(self.config.train.eval_every) else {}
                numbers = {**self._step_numbers(data, report, update), **held_out}
                on_rank_zero(partial(metrics.write, self.state.step, numbers))
                self._guard(data, report)
                crossings = self._crossings(data, numbers)
                is_last = any(crossing.stops for crossing in crossings)
                is_asked = stop.agreed(self.parallel, step=self.state.step, num_steps=num_steps)
                if is_last or is_asked or self._is_due(self.config.checkpoint.every):
                    with self.timers("checkpoint"):
                        self.store.save(self.state, self.policy, self.reference)
                if is_last:
                    self.store.finish()
                    stop_at(crossings)
                if is_asked:
                    break
        return self.state.step == num_steps

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss and its metrics over all of data.valid, each under valid/."""
        if self.data.valid is None:
            return {}
        with self.timers("evaluate"):
            reports = [
                self.policy.evaluate(self.data.valid.step(step).batches, self.loss, self.reference)
                for step in range(self.data.valid.num_evaluation_steps)
            ]
        whole = combine_reports(reports, loss_name=self.loss.name)
        return {f"valid/{name}": value for name, value in {"loss": whole.loss, **whole.metrics}.items()}

    def _advance(self, data: StepData, update: OptimStep) -> None:
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            consumed_samples=self.state.consumed_samples + data.num_sequences,
            skipped_steps=self.state.skipped_steps + update.is_skipped,
            consecutive_skipped_steps=(self.state.consecutive_skipped_steps + 1) * update.is_skipped,
        )

    def _warn_once(self, data: StepData, report: StepReport, update: OptimStep) -> None:
        """Tell of a loss without a gradient, after the first update of this process that has loss tokens."""
        if self._is_learning_checked or data.num_loss_tokens == 0:
            return
        self._is_learning_checked = True
        warning = no_gradient_warning(report, grad_norm=update.grad_norm, loss_name=self.loss.name)
        if warning is not None and self.parallel.rank == 0:
            print(f"warning: step {self.state.step}: {warning}", file=sys.stderr, flush=True)

    def _crossings(self, data: StepData, numbers: dict[str, float]) -> list[Crossing]:
        """The gates that this step has crossed, told."""

        # Times and memory differ between ranks: rank 0's decide, or one rank alone would stop.
        def check() -> list[Crossing]:
            crossings = self.gates.check(self.state.step, numbers, is_whole=data.num_loss_tokens > 0)
            tell(crossings)
            return crossings

        return on_rank_zero(check)

    def _guard(self, data: StepData, report: StepReport) -> None:
        rows = [
            row
            for dp_rank, microbatch in report.nonfinite_microbatches
            for row in data.microbatch_rows[dp_rank][microbatch]
        ]
        suspects = [self.data.describe(row) for row in rows or data.rows]
        tell_skipped(int(self.state.consecutive_skipped_steps > 0), step=self.state.step, suspects=suspects)
        stop_on_nonfinite_streak(
            self.state.consecutive_skipped_steps,
            limit=self.config.train.max_nonfinite_steps,
            step=self.state.step,
            suspects=suspects,
            directory=str(self.directory.checkpoints),
        )

    def _step_numbers(self, data: StepData, report: StepReport, update: OptimStep) -> dict[str, float]:
        seconds = self.timers.collect()
        busy = sum(seconds[phase] for phase in ("data", "forward_backward", "optimizer", "reference"))
        return {
            "loss": report.loss,
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "tokens": data.num_tokens,
            "loss_tokens": data.num_loss_tokens,
            "tokens_per_second": data.num_tokens / busy,
            "padding_share": 1.0 - data.num_tokens / data.num_padded_tokens,
            "epoch": self.state.consumed_samples / self.data.num_rows,
            "skipped_steps": self.state.skipped_steps,
            **report.metrics,
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
            **save_numbers(self.store),
            **self.stragglers.numbers(),
            "peak_memory_bytes": peak_memory_bytes(self.parallel.device),
        }

    def _is_due(self, every: int) -> bool:
        """After every `every` steps, and at the end of the run in any case."""
        return self.state.step == self.data.num_steps or (every > 0 and self.state.step % every == 0)
