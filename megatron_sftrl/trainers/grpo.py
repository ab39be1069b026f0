"""`sftrl grpo`: generate, reward, update; the same engine and the same losses as `sftrl sft`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from megatron_sftrl.config.placement import generators_config
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.loader import StepData
from megatron_sftrl.data.packing import padded_batch
from megatron_sftrl.data.prompts import PromptSet
from megatron_sftrl.engine.objective import StepReport, combine_reports
from megatron_sftrl.engine.optimizer import OptimStep
from megatron_sftrl.engine.parallel import run_context
from megatron_sftrl.engine.policy import Part
from megatron_sftrl.engine.sides import Bridge, Side, side_of
from megatron_sftrl.engine.together import SharedProgress, on_every_rank, on_rank_zero
from megatron_sftrl.losses.grpo import OF_DEMONSTRATIONS
from megatron_sftrl.observability.run_directory import open_run_directory
from megatron_sftrl.observability.watch import HangWatch
from megatron_sftrl.rl.rewards import (
    RewardPool,
    check_canaries,
    constant_answers,
    describe_failures,
)
from megatron_sftrl.rl.rewards.registry import Json
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.rollout.build import (
    build_engine,
    check_engine,
    engine_here,
    remote_engine,
    serve_trainers,
)
from megatron_sftrl.trainers.answers import Answers
from megatron_sftrl.trainers.checked import CheckedRun, batch_layout, checked_run
from megatron_sftrl.trainers.demonstrations import SftTerm, open_sft_term
from megatron_sftrl.trainers.engine_updates import EngineUpdates
from megatron_sftrl.trainers.experience import (
    ExperienceBatches,
    Response,
    ask_logprobs_and_entropies,
    by_row,
    look_at_tokens,
    sampled,
    with_seen,
)
from megatron_sftrl.trainers.grpo_numbers import (
    HELD_OUT,
    filling_metrics,
    mismatch_metrics,
    response_metrics,
    staleness,
    uncertain_entropy,
)
from megatron_sftrl.trainers.guards import named_step, stop_on_idle_streak, tell_skipped
from megatron_sftrl.trainers.rollouts import (
    Begun,
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
from megatron_sftrl.types import SamplingParams, TokenBatch

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update: what was measured on responses, on demonstrations beside them, or on both.

    `seen` has old_logprobs and entropies by the place of the response, where the update's own forward is the
    first that needs them.
    """

    optim: OptimStep
    responses: StepReport | None
    demonstrations: StepReport | None = None
    seen: Mapping[int, Sequence[Sequence[float]]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The weighted sum of both."""
        return sum(each.loss for each in (self.responses, self.demonstrations) if each is not None)


def weighted(batches: Sequence[TokenBatch], share: float) -> list[TokenBatch]:
    """Micro-batches that count `share` of what they did in their update."""
    return [replace(batch, token_weight=batch.token_weight * share) for batch in batches]


def of_one_length(parts: Sequence[Part]) -> list[Part]:
    """The parts with all micro-batches padded to the longest; those inside of a part are equal already."""
    longest = max(part.batches[0].num_tokens for part in parts)
    return [replace(part, batches=[padded_batch(batch, longest) for batch in part.batches]) for part in parts]


def update_metrics(updates: Sequence[Update], *, loss_name: str) -> dict[str, float]:
    """Averages over the updates of a step: the loss, and what losses measured, the SFT term's under sft/."""
    if not updates:
        return {}
    numbers: dict[str, float] = {
        "loss": sum(each.loss for each in updates) / len(updates),
        "grad_norm": sum(each.optim.grad_norm for each in updates) / len(updates),
        "lr": sum(each.optim.lr for each in updates) / len(updates),
    }
    if reports := [each.responses for each in updates if each.responses is not None]:
        numbers |= combine_reports(reports, loss_name=loss_name).metrics
        if share := numbers.get("grpo/demonstration_share"):
            numbers |= {name: numbers[name] / share for name in OF_DEMONSTRATIONS}
    if reports := [each.demonstrations for each in updates if each.demonstrations is not None]:
        whole = combine_reports(reports, loss_name=loss_name)
        numbers |= {f"sft/{name}": value for name, value in whole.metrics.items()}
    return numbers


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
    side = side_of(config.rollout.devices)
    if side is not None and side.is_generator:
        return run_generator(checked, side)
    prompts, valid = open_prompts(checked)
    hang_minutes = config.train.hang_minutes
    with (
        StopRequest() as stop,
        run_context(config, side and side.ranks) as parallel,
        Bridge(side, parallel, hang_minutes=hang_minutes) if side else nullcontext() as bridge,
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
        sft_term = open_sft_term(checked, directory, parallel)
        run = Run(
            checked,
            directory,
            parallel,
            stop,
            num_steps=num_rollout_steps(config, prompts),
            fingerprint=_fingerprint(prompts, sft_term),
            columns="prompts, answers, demonstrations or weights",
            held_out=HELD_OUT if valid else (),
            sometimes=sometimes_there(config),
        )
        progress = shared_progress(parallel, run.watch, hang_minutes=hang_minutes)
        if bridge is not None:
            engine = remote_engine(config, run.policy, progress, bridge)
        else:
            engine = build_engine(config, run.policy, checked.tokenizer.decode, progress)
        with contextlib.closing(engine):
            run.begin()
            is_finished = GrpoTrainer(
                run, checked, engine, prompts, valid, rewards, progress, sft_term
            ).train()
        if bridge is not None:
            bridge.is_finished = is_finished
    run.tell_end()
    return is_finished


def run_generator(checked: CheckedRun[GrpoConfig], side: Side) -> bool:
    """A process of rollout.devices, to the end of the trainers; what it returns and raises is theirs.

    A signal that asks the job to stop is theirs, too: they take it after a step.
    """
    config = generators_config(checked.config, is_mixture=checked.architecture.mixture is not None)
    hang_minutes = config.train.hang_minutes
    watch = HangWatch(hang_minutes)
    with (
        StopRequest(),
        run_context(config, side.ranks) as parallel,
        Bridge(side, parallel, hang_minutes=hang_minutes) as bridge,
        watch,
    ):
        progress = shared_progress(parallel, watch, hang_minutes=hang_minutes)
        return serve_trainers(
            config, checked.architecture, parallel, checked.tokenizer.decode, progress, bridge
        )


def _fingerprint(prompts: PromptSet, sft_term: SftTerm | None) -> str:
    if sft_term is None:
        return prompts.fingerprint
    return hashlib.sha256(f"{prompts.fingerprint} {sft_term.fingerprint}".encode()).hexdigest()


def sometimes_there(config: GrpoConfig) -> tuple[str, ...]:
    """Metrics, or families of them, that a step may lack."""
    rollout = config.rollout
    # Of a step in which each group has a response that could not be judged.
    names = [f"reward/pass_at_{rollout.group_size}"]
    if rollout.demonstrations:  # and of one whose prompts all have demonstrations, or none of them has
        names += [f"reward/pass_at_{rollout.group_size - rollout.demonstrations}", "reward/demonstrations"]
    if config.sft is not None and config.sft.mu.valley == 0:
        names.append("sft/")
    return tuple(names)


def note_constant_answers(rewards: RewardPool, prompts: PromptSet) -> None:
    """Log which of the run's tasks reward an answer that is always the same."""
    line = constant_answers(rewards, (cast(dict[str, Json], row.values) for row in prompts.rows))
    if line:
        LOGGER.info(line)


class GrpoTrainer:
    """The loop of a run, one step after the other.

    Args:
        looks_ahead: a forward of its own finds the old log-probabilities of the first mini-batch, too, which
            its first update would know without; the numbers are the same.
    """

    def __init__(
        self,
        run: Run[GrpoConfig],
        checked: CheckedRun[GrpoConfig],
        engine: RolloutEngine,
        prompts: PromptSet,
        valid: PromptSet | None,
        rewards: RewardPool,
        progress: SharedProgress,
        sft_term: SftTerm | None = None,
        *,
        looks_ahead: bool = False,
    ) -> None:
        config, parallel, tokenizer = run.config, run.parallel, checked.tokenizer
        self.run, self.config, self.engine, self.valid, self.tokenizer = run, config, engine, valid, tokenizer
        self.sft_term = sft_term
        # An update draws dropout, an engine does not: the policy that sampled is the one without.
        self._looks_ahead = looks_ahead or (config.lora is not None and config.lora.dropout > 0)
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
        self.answers = Answers(
            engine,
            tokenizer,
            parallel,
            rewards,
            self.sampling,
            config.advantages.estimator,
            run.timers,
            progress,
        )
        self.collector = RolloutCollector(config, prompts, self.answers)
        self._begun: Begun | None = None  # the next step, where it has been asked ahead
        self.batches = ExperienceBatches(
            batch=config.batch,
            layout=batch_layout(config, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size),
            max_length=config.rollout.max_new_tokens,
            pad_id=tokenizer.pad_id,
            mask_truncated=config.filters.mask_truncated,
            needs_reward="advantages" in run.loss.needs,
            has_demonstrations=config.rollout.demonstrations > 0,
            experts_shape=None if run.policy.router_replay is None else run.policy.router_replay.shape,
            shares_prompts=config.rollout.share_prompts,
        )
        self.updates = EngineUpdates(config, engine, run.policy, prompts.rows, self.batches, self.sampling)

    def train(self) -> bool:
        """Steps with evaluations and checkpoints between them, until the end (True) or a request to stop."""
        run = self.run
        with run.recorded(), contextlib.ExitStack() as stack:
            stack.callback(self._give_up)
            self.samples = on_every_rank(self._open_samples)
            while run.goes_on:
                collected, scored, updates = self._step()
                held_out = self.evaluate() if run.is_evaluation_due else {}
                numbers = {**self._step_numbers(collected, scored, updates), **held_out}
                on_rank_zero(partial(self._record, numbers, collected))
                is_whole = any(each.responses is not None for each in updates)
                run.end_step(numbers, suspects=_sources(scored), is_whole=is_whole)
                stop_on_idle_streak(
                    run.state.consecutive_idle_steps,
                    limit=self.config.filters.max_idle_steps,
                    step=run.state.step,
                    numbers=numbers,
                )
        return run.is_finished

    def _step(self) -> tuple[Collected, list[Response], list[Update]]:
        """The responses of one step, those that were trained on, and the updates that they gave.

        With rollout.ahead the responses are there already, and the engine's turn is the next step's: its
        rewards are found while this step's updates are made.
        """
        run = self.run
        num_skipped = run.state.skipped_steps
        with named_step(run.state.step + 1):
            if self._begun is not None:
                self._begun.asked.wait()  # generators take no weights before
            with self.updates.engine_turn(run.state.step, timed=run.timers("reshard")):
                collected = self._collect()
                self._begun = self._begin(after=collected) if self._asks_ahead else None
            with run.timers("old_logprobs"):
                mini_batches = self._with_old_logprobs(self._mini_batches(collected.responses))
            with run.timers("update"):
                scored, updates = self._update(mini_batches)
        run.state = replace(
            run.state,
            step=run.state.step + 1,
            consumed_samples=run.state.consumed_samples + collected.num_prompts,
            consecutive_idle_steps=0 if updates else run.state.consecutive_idle_steps + 1,
            drawn_prompts=collected.draws.drawn,
            useful_prompts=collected.draws.useful,
        )
        tell_skipped(run.state.skipped_steps - num_skipped, step=run.state.step, suspects=_sources(scored))
        run.follow(steps_done=run.state.step)
        return collected, scored, updates

    def evaluate(self) -> dict[str, float]:
        """Greedy responses to every held-out prompt, under valid/."""
        if self.valid is None:
            return {}
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0, num_samples=1)
        rows = list(enumerate(self.valid.rows))
        with named_step(self.run.state.step):
            if self._begun is not None:
                self._begun.asked.responses()  # the verifiers are free for others then
            with self.updates.engine_turn(self.run.state.step, timed=self.run.timers("evaluate")):
                responses = self.answers.answer(rows, greedy, phases=("evaluate", "evaluate"))
        collected = Collected(responses=(), generated=tuple(responses), num_prompts=len(responses))
        numbers = response_metrics(collected)
        found = {name: numbers.get(name.removeprefix("valid/")) for name in HELD_OUT}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def _asks_ahead(self) -> bool:
        """The next step is asked before this one's updates.

        Not where a checkpoint lies between them: a run that starts again there has its weights and no
        earlier ones, and goes on as if it had never stopped.
        """
        return self.config.rollout.ahead > 0 and not self.run.is_due(self.config.checkpoint.every, steps=1)

    def _collect(self) -> Collected:
        size, group_size = self.config.batch.global_size, self.config.rollout.group_size
        return self.collector.collect(
            self._begun or self._begin(), multiple_of=math.lcm(size, group_size) // group_size
        )

    def _begin(self, after: Collected | None = None) -> Begun:
        """Ask the step that follows the last one done, or the one `after` these responses."""
        state = self.run.state
        if after is None:
            recent = Draws(drawn=state.drawn_prompts, useful=state.useful_prompts)
            return self.collector.begin(consumed=state.consumed_samples, recent=recent)
        return self.collector.begin(consumed=state.consumed_samples + after.num_prompts, recent=after.draws)

    def _give_up(self) -> None:
        """The run ends, or fails, with a step that was asked ahead: no verifier goes on with it."""
        if self._begun is not None:
            self._begun.asked.close()

    @property
    def _mu(self) -> float:
        """The share of the SFT term in the step."""
        return 0.0 if self.sft_term is None else self.sft_term.section.mu.at(self.run.state.step)

    def _mini_batches(self, responses: Sequence[Response]) -> list[Sequence[Response]]:
        """batch.global_size responses each."""
        size = self.config.batch.global_size
        return [responses[start : start + size] for start in range(0, len(responses), size)]

    def _with_old_logprobs(self, mini_batches: Sequence[Sequence[Response]]) -> list[Sequence[Response]]:
        """What later updates ask of the policy that sampled: old_logprobs, and entropies with them.

        Those of the first update are found by its own forward: no weight has moved before it.
        """
        learned = [place for place, part in enumerate(mini_batches) if self.batches.has_signal(part)]
        # A mini-batch without a signal moves the weights where demonstrations stand beside it.
        is_first = learned[:1] == [0] or not self._mu
        ahead = learned[1:] if is_first and not self._looks_ahead else learned
        ask = partial(ask_logprobs_and_entropies, temperature=self.sampling.temperature)
        asked = [*mini_batches]
        for place in ahead:
            data = self.batches.lay_out(asked[place])
            assert data is not None, "what has a signal has tokens that are learned"
            asked[place] = with_seen(asked[place], look_at_tokens(self.run.policy, data, ask))
        return asked

    def _update(self, mini_batches: Sequence[Sequence[Response]]) -> tuple[list[Response], list[Update]]:
        """All responses with what was seen of them, and the updates: rollout.passes times the mini-batches.

        A mini-batch in which no response that carries loss has an advantage teaches nothing; Adam's momentum
        and weight decay must not move the weights for it, nor a KL or entropy term alone. Demonstrations
        beside it are learned in any case.
        """
        updates: list[Update] = []
        seen = [*mini_batches]
        for _ in range(self.config.rollout.passes):
            for place, part in enumerate(seen):
                data = self.batches.lay_out(part) if self.batches.has_signal(part) else None
                is_first = data is not None and not any(each.old_logprobs for each in part)
                found = self._one_update(data, sampled_at=self.sampling.temperature if is_first else None)
                if is_first:
                    seen[place] = with_seen(part, found[0].seen)
                updates += found
        return [each for part in seen for each in part], updates

    def _one_update(self, data: StepData | None, *, sampled_at: float | None = None) -> list[Update]:
        """From (1 - mu) * the loss of responses + mu * that of demonstrations; none without any of them.

        Args:
            sampled_at: as in engine.policy.Part, for the responses.
        Raises:
            FloatingPointError: on every rank, before a weight moves: what was seen is not finite.
        """
        run, term, mu = self.run, self.sft_term, self._mu
        parts = []
        if data is not None:
            batches = weighted(data.batches, 1.0 - mu) if mu else data.batches
            parts.append(Part(batches=batches, loss=run.loss, sampled_at=sampled_at))
        if term is not None and mu:
            shown = term.draw(run.state.consumed_demonstrations)
            parts.append(Part(batches=weighted(shown.batches, mu), loss=term.loss))
            consumed = run.state.consumed_demonstrations + shown.num_sequences
            run.state = replace(run.state, consumed_demonstrations=consumed)
        if not parts:
            return []
        if run.parallel.pp_size > 1:
            parts = of_one_length(parts)
        reports = run.policy.forward_backward_parts(parts, run.reference)
        seen = {}
        if data is not None and sampled_at is not None:
            seen = by_row(reports[0].seen, data, run.parallel)
        whole = replace(
            reports[0],
            loss=sum(each.loss for each in reports),
            is_trained=any(each.is_trained for each in reports),
        )
        optim = run.optimize(run.state.step, whole)
        run.check_learning(whole, grad_norm=optim.grad_norm, step=run.state.step + 1)
        return [
            Update(
                optim=optim,
                responses=None if data is None else reports[0],
                demonstrations=reports[-1] if mu else None,
                seen=seen,
            )
        ]

    def _step_numbers(
        self, collected: Collected, trained: Sequence[Response], updates: Sequence[Update]
    ) -> dict[str, float]:
        seconds = self.run.timers.collect()
        numbers = update_metrics(updates, loss_name=self.run.loss.name)
        if self.sft_term is not None:
            # The step is counted already.
            numbers["sft/mu"] = self.sft_term.section.mu.at(self.run.state.step - 1)
        if shown := [each.demonstrations.loss for each in updates if each.demonstrations is not None]:
            numbers["sft/loss"] = sum(shown) / len(shown) / numbers["sft/mu"]
        drawn = [each for each in sampled(trained) if each.old_logprobs]
        rollouts = [each.rollout for each in sampled(collected.generated)]
        num_generated = sum(len(rollout.response_tokens) for rollout in rollouts)
        num_tokens = num_generated + sum(len(rollout.prompt_tokens) for rollout in rollouts)
        if self.config.rollout.ahead:
            # The step is counted already.
            numbers["rollout/staleness"] = staleness(collected.generated, step=self.run.state.step - 1)
        return {
            **numbers,
            **response_metrics(collected),
            **filling_metrics(collected, wanted=self.config.rollout.prompts_per_step),
            **(mismatch_metrics(drawn) if drawn else {}),
            **({"rollout/entropy_top_fifth": uncertain_entropy(drawn)} if drawn else {}),
            **self.updates.numbers(),
            "updates": len(updates),
            "rollout/tokens_per_second": num_generated / collected.seconds,
            "tokens_per_second": num_tokens / sum(seconds.get(phase, 0.0) for phase in _PHASES),
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
