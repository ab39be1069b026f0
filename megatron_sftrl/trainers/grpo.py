"""`sftrl grpo`: generate, reward, update; the same engine and the same losses as `sftrl sft`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.prompts import PromptSet
from megatron_sftrl.engine.checkpoint import CheckpointStore
from megatron_sftrl.engine.objective import StepReport, combine_reports
from megatron_sftrl.engine.parallel import ParallelContext, parallel_context
from megatron_sftrl.engine.together import on_every_rank, on_rank_zero
from megatron_sftrl.observability.metrics import MetricsWriter
from megatron_sftrl.observability.run_directory import RunDirectory, open_run_directory
from megatron_sftrl.observability.watch import HangWatch, Timers, peak_memory_bytes
from megatron_sftrl.rl.advantages import logprob_mismatch, mean_pass_at_k, reward_statistics
from megatron_sftrl.rl.rewards import (
    RewardPool,
    check_canaries,
    constant_answers,
    describe_failures,
    reward_metrics,
)
from megatron_sftrl.rl.rewards.registry import Json
from megatron_sftrl.rollout.build import build_engine, check_engine
from megatron_sftrl.trainers.checked import RunPlan, batch_layout, export_assets, plan_run
from megatron_sftrl.trainers.engine_updates import EngineUpdates
from megatron_sftrl.trainers.experience import (
    ExperienceBatches,
    Response,
    first_rewards,
    grouped,
    known_rewards,
    score_responses,
)
from megatron_sftrl.trainers.guards import (
    Gates,
    named_step,
    no_gradient_warning,
    stop_at,
    stop_on_idle_streak,
    stop_on_nonfinite_streak,
    tell,
    tell_skipped,
)
from megatron_sftrl.trainers.origins import Origins
from megatron_sftrl.trainers.rollouts import (
    Collected,
    Draws,
    RolloutCollector,
    SampleLog,
    check_rows,
    num_rollout_steps,
    open_prompts,
    try_own_answers,
)
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
    shared_progress,
)
from megatron_sftrl.types import SamplingParams

# The numbers of one GRPO step that its responses alone decide.


SUCCESS = 0.5
"""A response succeeds when the first reward of the run gives it at least this, before its weight."""

HELD_OUT = tuple(
    f"valid/{name}"
    for name in (
        "reward/mean",
        "reward/lenient_mean",
        "reward/pass_at_1",
        "reward/unscored",
        "rollout/response_tokens",
    )
)
"""What an evaluation on held-out prompts measures."""


def response_metrics(collected: Collected) -> dict[str, float]:
    """Rewards, pass@k and lengths over everything that was generated, left-out groups included.

    A response without a reward is neither right nor wrong. It is left out of every number about rewards but
    its own, reward/unscored, and pass@k is over the groups of which k responses have one. A number that no
    response is left for is not there.
    """
    responses = collected.generated
    lengths = [len(each.rollout.response_tokens) for each in responses]
    return {
        **_reward_numbers(responses),
        **reward_metrics([each.scored for each in responses]),
        "rollout/prompts": len(grouped(responses)),
        "rollout/trained_responses": sum(each.scored.reward is not None for each in collected.responses),
        "rollout/response_tokens": sum(lengths) / len(lengths),
        "rollout/longest_response": max(lengths),
        "rollout/truncated": sum(not each.rollout.is_finished for each in responses) / len(responses),
    }


def _reward_numbers(responses: Sequence[Response]) -> dict[str, float]:
    """Spread of the rewards, and how often the first one says that a response is right."""
    numbers: dict[str, float] = {}
    if rewards := known_rewards(responses):
        statistics = reward_statistics(rewards)
        numbers["reward/std"] = statistics.std
        numbers["reward/zero_variance_groups"] = statistics.num_zero_variance_groups / statistics.num_groups
    successes = {
        group: [reward >= SUCCESS for reward in rewards]
        for group, rewards in first_rewards(responses).items()
    }
    for k in {1, min(map(len, grouped(responses).values()))}:
        if large := {group: found for group, found in successes.items() if len(found) >= k}:
            numbers[f"reward/pass_at_{k}"] = mean_pass_at_k(large, k)
    return numbers


def filling_metrics(collected: Collected, *, wanted: int) -> dict[str, float]:
    """How dynamic sampling filled the step; nothing without it.

    Args:
        collected: of the step.
        wanted: groups of a full step.
    Returns:
        rollout/rounds of generation; rollout/useful_groups, the share of the groups whose first rewards
        differ; rollout/filled, groups that are trained on over `wanted`; rollout/put_back, prompts that the
        next step draws again.
    """
    if not collected.num_rounds:
        return {}
    draws = collected.draws
    return {
        "rollout/rounds": collected.num_rounds,
        "rollout/useful_groups": draws.useful / draws.drawn,
        "rollout/filled": len(grouped(collected.responses)) / wanted,
        "rollout/put_back": draws.drawn - collected.num_prompts,
    }


def mismatch_metrics(responses: Sequence[Response]) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's, over all generated tokens.

    Args:
        responses: with old_logprobs.
    """
    ours = torch.tensor([value for each in responses for value in each.old_logprobs])
    engine = torch.tensor([value for each in responses for value in each.rollout.logprobs])
    found = logprob_mismatch(ours, engine, torch.ones_like(ours, dtype=torch.bool))
    return {
        "mismatch/mean": found.mean,
        "mismatch/max": found.maximum,
        "mismatch/p999": found.percentile_999,
        "mismatch/multiplicative_error": found.multiplicative_error,
    }


_PHASES = ("reshard", "generate", "reward", "old_logprobs", "update")


def run_grpo(config: GrpoConfig) -> bool:
    """Train as the configuration says; a run directory that holds this run's checkpoints is resumed.

    Returns:
        The run is finished; False when a signal stopped it, with a checkpoint.
    Raises:
        UserError: something that the user can fix, found before anything is built or overwritten; later
            only a full disk, a gate that stops, a reward that can judge nothing of the first step, or too
            many steps in a row without a finite gradient or without anything to learn from. All else that
            can be raised is a failure, as for run_sft.
    """
    plan = plan_run(config)
    prompts, valid = open_prompts(plan)
    with (
        StopRequest() as stop,
        parallel_context(config.parallel, hang_minutes=config.train.hang_minutes) as parallel,
        RewardPool(config.rewards, config.reward_workers) as rewards,
        contextlib.ExitStack() as stack,
    ):
        check_engine(config, plan.architecture, parallel.device, world_size=parallel.world_size)
        directory = open_run_directory(config, is_writer=False)
        stack.enter_context(hold(directory))
        sets = [prompts, *([valid] if valid else [])]
        check_rows(rewards.rewards, *sets)
        on_every_rank(lambda: check_canaries(rewards))
        on_rank_zero(lambda: try_own_answers(rewards, plan.tokenizer, *sets))
        on_rank_zero(lambda: note_constant_answers(rewards, prompts))
        trainer = GrpoTrainer(plan, directory, prompts, valid, rewards, parallel)
        with contextlib.closing(trainer.engine):
            on_rank_zero(lambda: begin_run(config, trainer.origins))
            return trainer.train(stop)


def note_constant_answers(rewards: RewardPool, prompts: PromptSet) -> None:
    """Say on stderr which of the run's tasks reward an answer that is always the same."""
    line = constant_answers(rewards, (cast(dict[str, Json], row.values) for row in prompts.rows))
    if line:
        print(line, file=sys.stderr)


class GrpoTrainer:
    """Owns the models, the rollout engine and the state of one run; `train` is the loop."""

    def __init__(
        self,
        plan: RunPlan[GrpoConfig],
        directory: RunDirectory,
        prompts: PromptSet,
        valid: PromptSet | None,
        rewards: RewardPool,
        parallel: ParallelContext,
    ) -> None:
        config = plan.config
        self.config, self.loss, self.directory, self.parallel = config, plan.loss, directory, parallel
        self.prompts, self.valid, self.rewards, self.tokenizer = prompts, valid, rewards, plan.tokenizer
        self.num_steps = num_rollout_steps(config, prompts)
        self.watch = HangWatch(config.train.hang_minutes)
        self.progress = shared_progress(config, parallel, self.watch)
        self.store = CheckpointStore(
            directory.checkpoints,
            parallel,
            keep_last=config.checkpoint.keep_last,
            assets=export_assets(plan),
            async_save=config.checkpoint.async_save,
            on_progress=self.watch.moved,
        )
        is_resumed = self.store.latest() is not None
        self.origins = Origins(directory, is_resumed=is_resumed)
        self.policy, self.reference = build_models(plan, parallel, self.origins, is_resumed=is_resumed)
        self.policy.on_microbatch = self.watch.moved
        self.engine = build_engine(config, self.policy, plan.tokenizer.decode, self.progress)
        self.state = resume_or_start(
            self.store,
            self.policy,
            self.reference,
            fingerprint=prompts.fingerprint,
            columns="prompts or answers",
        )
        self.gates = Gates(
            config.gates,
            defaults=plan.loss.config.default_gates(),
            held_out=HELD_OUT if valid else (),
            # Of a step in which each group has a response that could not be judged.
            sometimes=(f"reward/pass_at_{config.rollout.group_size}",),
        )
        self.samples: SampleLog | None = None  # rank 0 opens it once the run directory is the run's own
        self.stragglers = Stragglers(self.policy, parallel)
        self._is_learning_checked = False
        is_cuda = parallel.device.type == "cuda"
        self.timers = Timers(synchronize=torch.cuda.synchronize if is_cuda else None, on_end=self.watch.moved)
        self.sampling = SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_new_tokens=config.rollout.max_new_tokens,
            num_samples=config.rollout.group_size,
            stop_ids=plan.stop_ids,
            stop=tuple(config.rollout.stop),
            seed=config.seed,
        )
        self.collector = RolloutCollector(
            config, prompts, plan.tokenizer, parallel, rewards, self.sampling, self.timers, self.progress
        )
        self.batches = ExperienceBatches(
            batch=config.batch,
            layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
            max_length=config.rollout.max_new_tokens,
            pad_id=plan.tokenizer.pad_id,
            mask_truncated=config.filters.mask_truncated,
        )
        self.updates = EngineUpdates(
            config, self.engine, self.policy, prompts.rows, self.batches, self.sampling
        )

    def train(self, stop: StopRequest) -> bool:
        """Steps with evaluations and checkpoints between them, until the end (True) or a request to stop."""
        with (
            metrics_on_rank_zero(
                self.directory,
                self.config,
                self.parallel,
                resume_step=self.state.step,
                total_steps=self.num_steps,
            ) as metrics,
            self.watch,
            self.store,
        ):
            self.samples = on_every_rank(self._open_samples)
            while self.state.step < self.num_steps:
                num_skipped = self.state.skipped_steps
                with named_step(self.state.step + 1):
                    collected, scored = self._experience()
                with self.timers("update"):
                    reports = self._update(scored)
                self.state = replace(
                    self.state,
                    step=self.state.step + 1,
                    consumed_samples=self.state.consumed_samples + collected.num_prompts,
                    consecutive_idle_steps=0 if reports else self.state.consecutive_idle_steps + 1,
                    drawn_prompts=collected.draws.drawn,
                    useful_prompts=collected.draws.useful,
                )
                tell_skipped(
                    self.state.skipped_steps - num_skipped, step=self.state.step, suspects=_sources(scored)
                )
                follow(self.policy, self.reference, steps_done=self.state.step)
                held_out = self.evaluate() if self._is_due(self.config.train.eval_every) else {}
                numbers = {**self._step_numbers(collected, scored, reports), **held_out}
                on_rank_zero(partial(self._record, metrics, numbers, collected))
                is_asked = stop.agreed(self.parallel, step=self.state.step, num_steps=self.num_steps)
                self._guard(numbers, scored, is_asked=is_asked)
                if is_asked:
                    break
        return self.state.step == self.num_steps

    def _experience(self) -> tuple[Collected, list[Response]]:
        """The responses of one step; those that are trained on with the trainer's own log-probabilities."""
        with self.timers("reshard"):
            self.updates.refresh(self.state.step)
        collected = self._collect()
        self.updates.release()
        with self.timers("old_logprobs"):
            return collected, self._with_old_logprobs(collected.responses)

    def evaluate(self) -> dict[str, float]:
        """Greedy responses to every held-out prompt, under valid/."""
        if self.valid is None:
            return {}
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0, num_samples=1)
        rows = list(enumerate(self.valid.rows))
        with named_step(self.state.step):
            with self.timers("evaluate"):
                self.updates.refresh(self.state.step)
            responses = self.collector.answer(self.engine, rows, greedy, phases=("evaluate", "evaluate"))
        self.updates.release()
        collected = Collected(responses=(), generated=tuple(responses), num_prompts=len(responses))
        numbers = response_metrics(collected)
        found = {name: numbers.get(name.removeprefix("valid/")) for name in HELD_OUT}
        return {name: value for name, value in found.items() if value is not None}

    def _collect(self) -> Collected:
        size, group_size = self.config.batch.global_size, self.config.rollout.group_size
        return self.collector.collect(
            self.engine,
            consumed=self.state.consumed_samples,
            recent=Draws(drawn=self.state.drawn_prompts, useful=self.state.useful_prompts),
            multiple_of=math.lcm(size, group_size) // group_size,
        )

    def _with_old_logprobs(self, responses: Sequence[Response]) -> list[Response]:
        """The trainer's own log-probabilities at the sampling temperature, before the first update."""
        if not responses:
            return []
        found: dict[int, list[float]] = {}
        for start in range(0, len(responses), self.config.batch.global_size):
            part = responses[start : start + self.config.batch.global_size]
            data = self.batches.lay_out(part, everything=True)
            assert data is not None
            scores = score_responses(self.policy, data, temperature=self.sampling.temperature)
            found |= {start + place: values for place, values in scores.items()}
        return [replace(each, old_logprobs=tuple(found[i])) for i, each in enumerate(responses)]

    def _update(self, responses: Sequence[Response]) -> list[tuple[StepReport, dict[str, float]]]:
        """Mini-batches of batch.global_size responses, rollout.passes times over all of them.

        A mini-batch in which no response that carries loss has an advantage teaches nothing; Adam's momentum
        and weight decay shall not move the weights for it, nor a KL or entropy term alone.
        """
        reports, size = [], self.config.batch.global_size
        for _ in range(self.config.rollout.passes):
            for start in range(0, len(responses), size):
                part = responses[start : start + size]
                data = self.batches.lay_out(part) if self.batches.has_signal(part) else None
                if data is None:
                    continue
                report = self.policy.forward_backward(data.batches, self.loss, self.reference)
                update = self.policy.optim_step(self.state.step, num_steps=self.num_steps, loss=report.loss)
                self.state = replace(
                    self.state,
                    skipped_steps=self.state.skipped_steps + update.is_skipped,
                    consecutive_skipped_steps=(self.state.consecutive_skipped_steps + 1) * update.is_skipped,
                )
                reports.append((report, {"grad_norm": update.grad_norm, "lr": update.lr}))
                self._warn_once(report, update.grad_norm)
        return reports

    def _warn_once(self, report: StepReport, grad_norm: float) -> None:
        """Tell of a loss without a gradient, after the first update of this process; it had advantages."""
        warning = no_gradient_warning(report, grad_norm=grad_norm, loss_name=self.loss.name)
        if warning is not None and not self._is_learning_checked and self.parallel.rank == 0:
            print(f"warning: step {self.state.step + 1}: {warning}", file=sys.stderr, flush=True)
        self._is_learning_checked = True

    def _step_numbers(
        self,
        collected: Collected,
        trained: Sequence[Response],
        reports: Sequence[tuple[StepReport, dict[str, float]]],
    ) -> dict[str, float]:
        seconds = self.timers.collect()
        numbers: dict[str, float] = {}
        if reports:
            whole = combine_reports([report for report, _ in reports], loss_name=self.loss.name)
            numbers |= {
                "loss": whole.loss / len(reports),
                **{name: sum(each[name] for _, each in reports) / len(reports) for name in reports[0][1]},
                **whole.metrics,
            }
        rollouts = [each.rollout for each in collected.generated]
        num_generated = sum(len(rollout.response_tokens) for rollout in rollouts)
        num_tokens = num_generated + sum(len(rollout.prompt_tokens) for rollout in rollouts)
        return {
            **numbers,
            **response_metrics(collected),
            **filling_metrics(collected, wanted=self.config.rollout.prompts_per_step),
            **(mismatch_metrics(trained) if trained else {}),
            **self.updates.numbers(),
            "updates": len(reports),
            "skipped_steps": self.state.skipped_steps,
            "rollout/tokens_per_second": num_generated / seconds["generate"],
            "tokens_per_second": num_tokens / sum(seconds[phase] for phase in _PHASES),
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
            **save_numbers(self.store),
            **self.stragglers.numbers(),
            "peak_memory_bytes": peak_memory_bytes(self.parallel.device),
        }

    def _guard(self, numbers: dict[str, float], responses: Sequence[Response], *, is_asked: bool) -> None:
        """Save when it is due or asked for, and let gates and a streak of bad gradients end the run."""
        # Times and memory differ between ranks: rank 0's decide, or one rank alone would stop.
        crossings = on_rank_zero(
            lambda: self.gates.check(self.state.step, numbers, is_whole=numbers["updates"] > 0)
        )
        is_last = any(crossing.stops for crossing in crossings)
        if is_last or is_asked or self._is_due(self.config.checkpoint.every):
            with self.timers("checkpoint"):
                self.store.save(self.state, self.policy, self.reference)
        if self.parallel.rank == 0:
            tell(crossings)
        stop_on_nonfinite_streak(
            self.state.consecutive_skipped_steps,
            limit=self.config.train.max_nonfinite_steps,
            step=self.state.step,
            suspects=_sources(responses),
            directory=str(self.directory.checkpoints),
        )
        stop_on_idle_streak(
            self.state.consecutive_idle_steps,
            limit=self.config.filters.max_idle_steps,
            step=self.state.step,
            numbers=numbers,
        )
        if is_last:
            self.store.finish()
            stop_at(crossings)

    def _record(self, metrics: MetricsWriter, numbers: dict[str, float], collected: Collected) -> None:
        """Write a step's numbers, tell what verifiers could not do, and append its first groups' samples."""
        metrics.write(self.state.step, numbers)
        if self.samples is None:
            return
        for failure in describe_failures([each.scored for each in collected.generated]):
            print(f"step {self.state.step}: {failure}", file=sys.stderr, flush=True)
        self.samples.write(self.state.step, collected.generated)

    def _open_samples(self) -> SampleLog | None:
        if self.parallel.rank > 0:
            return None
        return SampleLog(
            self.directory.path / "rollouts.jsonl",
            self.tokenizer,
            num_groups=self.config.rollout.save_samples,
            resume_step=self.state.step,
        )

    def _is_due(self, every: int) -> bool:
        """After every `every` steps, and at the end of the run in any case."""
        return self.state.step == self.num_steps or (every > 0 and self.state.step % every == 0)


def _sources(responses: Sequence[Response]) -> list[str]:
    """Where the prompts of responses come from."""
    return sorted({each.row.source for each in responses})
