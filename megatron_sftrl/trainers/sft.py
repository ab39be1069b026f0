"""`sftrl sft`: supervised fine-tuning with any registered loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.data.loader import StepData
from megatron_sftrl.engine.objective import StepReport, combine_reports
from megatron_sftrl.engine.optimizer import OptimStep
from megatron_sftrl.engine.parallel import run_context
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.observability.run_directory import open_run_directory
from megatron_sftrl.trainers.checked import checked_run
from megatron_sftrl.trainers.demonstrations import Demonstrations, open_demonstrations
from megatron_sftrl.trainers.guards import tell_skipped
from megatron_sftrl.trainers.run import Run, StopRequest, hold


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
