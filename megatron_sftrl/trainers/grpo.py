"""`sftrl grpo`: generate, reward, update; the same engine and the same losses as `sftrl sft`."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.prompts import PromptSet
from megatron_sftrl.engine.objective import StepReport, combine_reports
from megatron_sftrl.engine.optimizer import OptimStep
from megatron_sftrl.engine.parallel import run_context
from megatron_sftrl.engine.together import SharedProgress, on_every_rank, on_rank_zero
from megatron_sftrl.observability.run_directory import open_run_directory
from megatron_sftrl.rl.advantages import (
    logprob_mismatch,
    mean_of_top_fifth,
    mean_pass_at_k,
    reward_statistics,
)
from megatron_sftrl.rl.rewards import (
    RewardPool,
    check_canaries,
    constant_answers,
    describe_failures,
    reward_metrics,
)
from megatron_sftrl.rl.rewards.registry import Json
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.rollout.build import build_engine, check_engine, engine_here
from megatron_sftrl.trainers.checked import CheckedRun, batch_layout, checked_run
from megatron_sftrl.trainers.engine_updates import EngineUpdates
from megatron_sftrl.trainers.experience import (
    ExperienceBatches,
    Response,
    first_rewards,
    grouped,
    known_rewards,
    look_at_responses,
)
from megatron_sftrl.trainers.guards import named_step, stop_on_idle_streak, tell_skipped
from megatron_sftrl.trainers.rollouts import (
    Collected,
    Draws,
    RolloutCollector,
    SampleLog,
    check_rows,
    note_unearned_marks,
    num_rollout_steps,
    open_prompts,
    try_own_answers,
)
from megatron_sftrl.trainers.run import Run, StopRequest, hold, shared_progress
from megatron_sftrl.types import SamplingParams

LOGGER = logging.getLogger(__name__)

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
    judged = [each.scored for each in responses if each.scored.first is not None]
    if judged:
        lenient = sum(each.parts[0].lenient >= SUCCESS for each in judged)
        strict = sum(each.parts[0].reward >= SUCCESS for each in judged)
        numbers["reward/format_loss"] = (lenient - strict) / len(judged)
    successes = {
        group: [reward >= SUCCESS for reward in rewards]
        for group, rewards in first_rewards(responses).items()
    }
    for k in {1, min(map(len, grouped(responses).values()))}:
        if large := {group: found for group, found in successes.items() if len(found) >= k}:
            numbers[f"reward/pass_at_{k}"] = mean_pass_at_k(large, k)
    return numbers


def filling_metrics(collected: Collected, *, wanted: int) -> dict[str, float]:
    """How dynamic sampling filled the step of `wanted` groups; nothing without it.

    rollout/rounds of generation; rollout/useful_groups, the share of the groups whose first rewards differ;
    rollout/filled, groups that are trained on over `wanted`; rollout/put_back, prompts that the next step
    draws again.
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


def uncertain_entropy(responses: Sequence[Response]) -> float:
    """rollout/entropy_top_fifth: mean over the fifth of a step's tokens with the highest entropy, in nats.

    Of the responses that are trained on, before the first update, at the sampling temperature.
    arXiv:2606.18487 speaks of worst-token entropy; that these tokens are meant is our reading.
    """
    return mean_of_top_fifth([value for each in responses for value in each.entropies])


def mismatch_metrics(responses: Sequence[Response]) -> dict[str, float]:
    """How far the engine's log-probabilities are from old_logprobs, over all generated tokens."""
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
        UserError: something that the user can fix, found before anything is built or overwritten; later only
            a full disk, a gate that stops, a reward that can judge nothing of the first step, or too many
            steps in a row without a finite gradient or without anything to learn from. All else that can be
            raised is a failure, as for run_sft.
    """
    config = engine_here(config)
    checked = checked_run(config)
    prompts, valid = open_prompts(checked)
    with (
        StopRequest() as stop,
        run_context(config) as parallel,
        RewardPool(config.rewards, config.reward_workers) as rewards,
        contextlib.ExitStack() as stack,
    ):
        check_engine(config, checked.architecture, parallel.device, world_size=parallel.world_size)
        directory = open_run_directory(config, is_writer=False)
        stack.enter_context(hold(directory))
        sets = [prompts, *([valid] if valid else [])]
        check_rows(rewards.rewards, *sets)
        on_every_rank(lambda: check_canaries(rewards))
        on_rank_zero(lambda: try_own_answers(rewards, checked.tokenizer, *sets))
        on_rank_zero(lambda: note_unearned_marks(rewards, checked.tokenizer, prompts, config.run_dir))
        on_rank_zero(lambda: note_constant_answers(rewards, prompts))
        run = Run(
            checked,
            directory,
            parallel,
            stop,
            num_steps=num_rollout_steps(config, prompts),
            fingerprint=prompts.fingerprint,
            columns="prompts, answers or weights",
            held_out=HELD_OUT if valid else (),
            # Of a step in which each group has a response that could not be judged.
            sometimes=(f"reward/pass_at_{config.rollout.group_size}",),
        )
        progress = shared_progress(parallel, run.watch, hang_minutes=config.train.hang_minutes)
        engine = build_engine(config, run.policy, checked.tokenizer.decode, progress)
        with contextlib.closing(engine):
            run.begin()
            is_finished = GrpoTrainer(run, checked, engine, prompts, valid, rewards, progress).train()
    run.tell_end()
    return is_finished


def note_constant_answers(rewards: RewardPool, prompts: PromptSet) -> None:
    """Log which of the run's tasks reward an answer that is always the same."""
    line = constant_answers(rewards, (cast(dict[str, Json], row.values) for row in prompts.rows))
    if line:
        LOGGER.info(line)


class GrpoTrainer:
    def __init__(
        self,
        run: Run[GrpoConfig],
        checked: CheckedRun[GrpoConfig],
        engine: RolloutEngine,
        prompts: PromptSet,
        valid: PromptSet | None,
        rewards: RewardPool,
        progress: SharedProgress,
    ) -> None:
        config, parallel, tokenizer = run.config, run.parallel, checked.tokenizer
        self.run, self.config, self.engine, self.valid, self.tokenizer = run, config, engine, valid, tokenizer
        self.samples: SampleLog | None = None  # rank 0 opens it once the run directory is the run's own
        self.sampling = SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_new_tokens=config.rollout.max_new_tokens,
            num_samples=config.rollout.group_size,
            stop_ids=checked.stop_ids,
            stop=tuple(config.rollout.stop),
            seed=config.seed,
        )
        self.collector = RolloutCollector(
            config, prompts, tokenizer, parallel, rewards, self.sampling, run.timers, progress
        )
        self.batches = ExperienceBatches(
            batch=config.batch,
            layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
            max_length=config.rollout.max_new_tokens,
            pad_id=tokenizer.pad_id,
            mask_truncated=config.filters.mask_truncated,
        )
        self.updates = EngineUpdates(config, engine, run.policy, prompts.rows, self.batches, self.sampling)

    def train(self) -> bool:
        """Steps with evaluations and checkpoints between them, until the end (True) or a request to stop."""
        run = self.run
        with run.recorded():
            self.samples = on_every_rank(self._open_samples)
            while run.goes_on:
                collected, scored, reports = self._step()
                held_out = self.evaluate() if run.is_evaluation_due else {}
                numbers = {**self._step_numbers(collected, scored, reports), **held_out}
                on_rank_zero(partial(self._record, numbers, collected))
                run.end_step(numbers, suspects=_sources(scored), is_whole=bool(reports))
                stop_on_idle_streak(
                    run.state.consecutive_idle_steps,
                    limit=self.config.filters.max_idle_steps,
                    step=run.state.step,
                    numbers=numbers,
                )
        return run.is_finished

    def _step(self) -> tuple[Collected, list[Response], list[tuple[StepReport, OptimStep]]]:
        """The responses of one step, those that were trained on, and the updates that they gave."""
        run = self.run
        num_skipped = run.state.skipped_steps
        with named_step(run.state.step + 1):
            with self.updates.engine_turn(run.state.step, timed=run.timers("reshard")):
                collected = self._collect()
            with run.timers("old_logprobs"):
                scored = self._with_old_logprobs(collected.responses)
        with run.timers("update"):
            reports = self._update(scored)
        run.state = replace(
            run.state,
            step=run.state.step + 1,
            consumed_samples=run.state.consumed_samples + collected.num_prompts,
            consecutive_idle_steps=0 if reports else run.state.consecutive_idle_steps + 1,
            drawn_prompts=collected.draws.drawn,
            useful_prompts=collected.draws.useful,
        )
        tell_skipped(run.state.skipped_steps - num_skipped, step=run.state.step, suspects=_sources(scored))
        run.follow(steps_done=run.state.step)
        return collected, scored, reports

    def evaluate(self) -> dict[str, float]:
        """Greedy responses to every held-out prompt, under valid/."""
        if self.valid is None:
            return {}
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0, num_samples=1)
        rows = list(enumerate(self.valid.rows))
        with (
            named_step(self.run.state.step),
            self.updates.engine_turn(self.run.state.step, timed=self.run.timers("evaluate")),
        ):
            responses = self.collector.answer(self.engine, rows, greedy, phases=("evaluate", "evaluate"))
        collected = Collected(responses=(), generated=tuple(responses), num_prompts=len(responses))
        numbers = response_metrics(collected)
        found = {name: numbers.get(name.removeprefix("valid/")) for name in HELD_OUT}
        return {name: value for name, value in found.items() if value is not None}

    def _collect(self) -> Collected:
        size, group_size = self.config.batch.global_size, self.config.rollout.group_size
        return self.collector.collect(
            self.engine,
            consumed=self.run.state.consumed_samples,
            recent=Draws(drawn=self.run.state.drawn_prompts, useful=self.run.state.useful_prompts),
            multiple_of=math.lcm(size, group_size) // group_size,
        )

    def _with_old_logprobs(self, responses: Sequence[Response]) -> list[Response]:
        """The trainer's own log-probabilities and entropies at the sampling temperature, before an update."""
        found = look_at_responses(
            self.run.policy, self.batches, responses, temperature=self.sampling.temperature
        )
        return [
            replace(each, old_logprobs=tuple(logprobs), entropies=tuple(entropies))
            for each, (logprobs, entropies) in zip(responses, found, strict=True)
        ]

    def _update(self, responses: Sequence[Response]) -> list[tuple[StepReport, OptimStep]]:
        """Mini-batches of batch.global_size responses, rollout.passes times over all of them.

        A mini-batch in which no response that carries loss has an advantage teaches nothing; Adam's momentum
        and weight decay must not move the weights for it, nor a KL or entropy term alone.
        """
        run, reports, size = self.run, [], self.config.batch.global_size
        for _ in range(self.config.rollout.passes):
            for start in range(0, len(responses), size):
                part = responses[start : start + size]
                data = self.batches.lay_out(part) if self.batches.has_signal(part) else None
                if data is None:
                    continue
                report = run.policy.forward_backward(data.batches, run.loss, run.reference)
                update = run.optimize(run.state.step, report)
                reports.append((report, update))
                run.check_learning(report, grad_norm=update.grad_norm, step=run.state.step + 1)
        return reports

    def _step_numbers(
        self,
        collected: Collected,
        trained: Sequence[Response],
        reports: Sequence[tuple[StepReport, OptimStep]],
    ) -> dict[str, float]:
        seconds = self.run.timers.collect()
        numbers: dict[str, float] = {}
        if reports:
            whole = combine_reports([report for report, _ in reports], loss_name=self.run.loss.name)
            numbers |= {
                "loss": whole.loss / len(reports),
                "grad_norm": sum(update.grad_norm for _, update in reports) / len(reports),
                "lr": sum(update.lr for _, update in reports) / len(reports),
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
            **({"rollout/entropy_top_fifth": uncertain_entropy(trained)} if trained else {}),
            **self.updates.numbers(),
            "updates": len(reports),
            "rollout/tokens_per_second": num_generated / seconds["generate"],
            "tokens_per_second": num_tokens / sum(seconds[phase] for phase in _PHASES),
            **self.run.numbers(seconds),
        }

    def _record(self, numbers: dict[str, float], collected: Collected) -> None:
        """Write a step's numbers, tell what verifiers could not do, and append its first groups' samples."""
        self.run.write(numbers)
        if self.samples is None:
            return
        for failure in describe_failures([each.scored for each in collected.generated]):
            LOGGER.warning("step %d: %s", self.run.state.step, failure)
        self.samples.write(self.run.state.step, collected.generated)

    def _open_samples(self) -> SampleLog | None:
        if self.run.parallel.rank > 0:
            return None
        return SampleLog(
            self.run.directory.path / "rollouts.jsonl",
            self.tokenizer,
            num_groups=self.config.rollout.save_samples,
            resume_step=self.run.state.step,
        )


def _sources(responses: Sequence[Response]) -> list[str]:
    return sorted({each.row.source for each in responses})
