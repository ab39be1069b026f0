"""The first half of a GRPO step: prompts are drawn, answered and rewarded until there is enough to learn."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch.distributed as dist

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.loader import SampleOrder, num_training_steps
from megatron_sftrl.data.prompts import PromptRow, PromptSet, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import SharedProgress, on_every_rank
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.observability.watch import Timers
from megatron_sftrl.rl.advantages import informative_groups
from megatron_sftrl.rl.rewards import (
    OwnRow,
    Reward,
    RewardInputs,
    RewardPool,
    Scored,
    Scoring,
    check_own_rows,
    failed_everywhere,
    spread,
    unearned_marks,
)
from megatron_sftrl.rl.rewards.registry import Json
from megatron_sftrl.rollout.api import OnResponse, RolloutEngine, no_matter
from megatron_sftrl.trainers.checked import CheckedRun, response_text
from megatron_sftrl.trainers.experience import Response, first_rewards, grouped, with_advantages
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

LOGGER = logging.getLogger(__name__)

# How many prompts a step of dynamic sampling draws, and which of the useful groups it trains on.


_MARGIN = 2.0
"""Standard deviations by which a draw is larger than what it takes on average: 98 of 100 draws suffice."""

_MOST_AT_ONCE = 4
"""Most prompts of one draw, in multiples of rollout.prompts_per_step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Prompts that were answered, and of them those whose responses were not all equally good.

    Of the last step it is the share that the next one counts on.
    """

    drawn: int = 0
    useful: int = 0

    def __add__(self, other: Draws) -> Draws:
        return Draws(drawn=self.drawn + other.drawn, useful=self.useful + other.useful)


NO_DRAWS = Draws()


def num_to_draw(missing: int, *, seen: Draws, wanted: int) -> int:
    """Prompts to draw so that `missing` of them are useful, most probably.

    Until m useful ones are found at a useful share s it takes m / s draws on average, with a standard
    deviation of sqrt(m (1 - s)) / s (negative binomial distribution), so that

        n = (m + 2 sqrt(m (1 - s))) / s

    Args:
        missing: m, at least 1.
        seen: the last step's draws and this step's, from which s is taken.
        wanted: prompts of a full step: what is drawn while no share is known, and a quarter of the most.
    """
    if not seen.useful:
        return missing if not seen.drawn else wanted
    share = seen.useful / seen.drawn
    number = (missing + _MARGIN * math.sqrt(missing * (1 - share))) / share
    return min(math.ceil(number), _MOST_AT_ONCE * wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """What a step takes of the groups that it found.

    Args:
        trained: ids of the groups that are trained on, whole mini-batches of them.
        num_prompts: how far the order of the data has moved. Useful groups beyond what is trained are put
            back: the next step draws their prompts again and answers them with its own policy.
    """

    trained: tuple[int, ...]
    num_prompts: int


def fill(useful: Sequence[int], *, first: int, drawn: int, wanted: int, multiple_of: int) -> Filling:
    """Choose the first `wanted` useful groups, or as many whole mini-batches as there are.

    An update of a part of a mini-batch would have the step size of a whole one. A search that found no whole
    one puts nothing back: the same policy would draw the same responses again.

    Args:
        useful: ids, which are places in the order of the data, ascending.
        first, drawn: place of the step's first prompt, and its number of prompts.
        wanted: groups of a full step, a multiple of `multiple_of`.
        multiple_of: groups of the smallest number of whole mini-batches that ends with a group.
    """
    assert wanted % multiple_of == 0, "config.checks refuses mini-batches that do not divide a step"
    count = min(len(useful), wanted) // multiple_of * multiple_of
    is_put_back = 0 < count < len(useful)
    return Filling(trained=tuple(useful[:count]), num_prompts=useful[count] - first if is_put_back else drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The responses of one step.

    Args:
        responses: those that are trained on, group by group.
        generated: all of them, left-out groups included.
        num_prompts: by which the order of the data has moved.
        draws, num_rounds: under dynamic sampling, what became of the prompts, and rounds of generation.
    """

    responses: tuple[Response, ...]
    generated: tuple[Response, ...]
    num_prompts: int
    draws: Draws = NO_DRAWS
    num_rounds: int = 0


class RolloutCollector:
    """Draws prompts in the run's order and turns them into responses with rewards and advantages.

    Every rank calls it and gets the same result: engines generate together, and each rank scores a share.
    """

    def __init__(
        self,
        config: GrpoConfig,
        prompts: PromptSet,
        tokenizer: Tokenizer,
        parallel: ParallelContext,
        rewards: RewardPool,
        sampling: SamplingParams,
        timers: Timers,
        progress: SharedProgress | None = None,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._parallel = parallel
        self._rewards = rewards
        self._sampling = sampling
        self._timers = timers
        self._progress = progress
        self._order = SampleOrder(
            len(prompts.rows), seed=config.seed, shuffle=config.data.shuffle, mixture=prompts.mixture
        )

    def collect(
        self, engine: RolloutEngine, *, consumed: int, recent: Draws = NO_DRAWS, multiple_of: int = 1
    ) -> Collected:
        """One step's responses; the engine is awake, with the policy's weights.

        Args:
            consumed: prompts drawn by the steps before.
            recent: draws of the step before, under dynamic sampling.
            multiple_of: under dynamic sampling groups are trained in multiples of it.
        Raises:
            UserError: a reward failed on every response of the run's first step.
            RuntimeError: it did so in a later step.
        """
        wanted, filters = self._config.rollout.prompts_per_step, self._config.filters
        if not filters.dynamic_sampling:
            generated = self._draw(engine, consumed, wanted)
            stop_on_broken_reward(generated, is_first_step=consumed == 0)
            return Collected(responses=generated, generated=generated, num_prompts=wanted)
        generated, useful, draws, num_rounds = (), [], NO_DRAWS, 0
        while num_rounds < filters.max_rounds and len(useful) < wanted:
            count = num_to_draw(wanted - len(useful), seen=recent + draws, wanted=wanted)
            responses = self._draw(engine, consumed + draws.drawn, count)
            generated += responses
            stop_on_broken_reward(generated, is_first_step=consumed == 0)
            found = useful_groups(responses)
            useful += found
            draws += Draws(drawn=count, useful=len(found))
            num_rounds += 1
        filling = fill(useful, first=consumed, drawn=draws.drawn, wanted=wanted, multiple_of=multiple_of)
        trained = frozenset(filling.trained)
        return Collected(
            responses=tuple(each for each in generated if each.group in trained),
            generated=generated,
            num_prompts=filling.num_prompts,
            draws=draws,
            num_rounds=num_rounds,
        )

    def _draw(self, engine: RolloutEngine, start: int, count: int) -> tuple[Response, ...]:
        """Groups for the next prompts of the run's order, whose ids are their places in it."""
        numbers = range(start, start + count)
        rows = [self._prompts.rows[row] for row in self._order.rows(start, count)]
        copies = self._config.rollout.demonstrations
        return tuple(self.answer(engine, list(zip(numbers, rows, strict=True)), copies=copies))

    def answer(
        self,
        engine: RolloutEngine,
        rows: Sequence[tuple[int, PromptRow]],
        sampling: SamplingParams | None = None,
        *,
        phases: tuple[str, str] = ("generate", "reward"),
        copies: int = 0,
    ) -> list[Response]:
        """Generate with an awake engine, score and compare within each group.

        A response is scored when it has ended, while others are still being generated; the second phase is
        what remains.

        Args:
            rows: (id of the prompt in the run, its row).
            sampling: the run's when not given.
            phases: what the time of both halves is counted for.
            copies: of a group's responses, those that its row's demonstration takes the place of, where the
                row has one.
        Raises:
            RuntimeError: the engine left a prompt or a response out.
            FloatingPointError: the policy's logits are NaN or infinite.
        """
        sampling, row_of = sampling or self._sampling, dict(rows)
        with Scoring(self._rewards) as scoring:
            asked: list[tuple[int, int]] = []

            def ask(number: int, place: int, rollout: Rollout) -> None:
                asked.append((number, place))
                scoring.add(lambda: self._reward_inputs(rollout, row_of[number]))

            with self._timers(phases[0]):
                for each in self._share_of_demonstrations(rows, sampling.num_samples, copies):
                    ask(*each)
                members = generate_groups(
                    engine,
                    rows,
                    sampling,
                    copies=copies,
                    on_response=lambda prompt, place, rollout: ask(prompt.id, place, rollout),
                )
            with self._timers(phases[1]):
                scored = on_every_rank(lambda: self._rewarded(scoring))
                known = _of_every_rank(dict(zip(asked, scored, strict=True)), self._parallel)
        responses = [
            Response(
                group=number,
                row=row_of[number],
                rollout=rollout,
                scored=known[number, place],
                is_demonstration=is_demonstration,
            )
            for number, place, rollout, is_demonstration in members
        ]
        return with_advantages(responses, self._config.advantages.estimator)

    def _share_of_demonstrations(
        self, rows: Sequence[tuple[int, PromptRow]], size: int, copies: int
    ) -> list[tuple[int, int, Rollout]]:
        """What this rank scores of them: every world_size-th. (id, place in its group, response)."""
        shown = [
            (number, size - copies + copy, _demonstrated(row))
            for number, row in rows
            if row.demonstration is not None
            for copy in range(copies)
        ]
        return shown[self._parallel.rank :: self._parallel.world_size]

    def _reward_inputs(self, rollout: Rollout, row: PromptRow) -> RewardInputs:
        return RewardInputs(
            prompt=self._tokenizer.decode(rollout.prompt_tokens),
            response=response_text(self._tokenizer, rollout.response_tokens, self._sampling),
            row=row.values,  # type: ignore[arg-type]
            num_response_tokens=len(rollout.response_tokens),
            is_finished=rollout.is_finished,
        )

    def _rewarded(self, scoring: Scoring) -> list[Scored]:
        """Ranks are done at different times, and a slow verifier may take hours: all see it move."""
        if self._progress is None:
            return scoring.results()
        moved = self._progress.moved
        return self._progress.together(lambda: scoring.results(moved))


_Place = tuple[int, int]
"""The id of a prompt, and the place of a response in its group."""


def _of_every_rank(mine: dict[_Place, Scored], parallel: ParallelContext) -> dict[_Place, Scored]:
    shares: list[dict[_Place, Scored] | None] = [None] * parallel.world_size
    dist.all_gather_object(shares, mine)
    return {place: scored for share in shares if share for place, scored in share.items()}


Member = tuple[int, int, Rollout, bool]
"""The id of a prompt, the place of a response in its group, the response, whether it is the demonstration."""


def generate_groups(
    engine: RolloutEngine,
    rows: Sequence[tuple[int, PromptRow]],
    sampling: SamplingParams,
    *,
    copies: int,
    on_response: OnResponse = no_matter,
) -> list[Member]:
    """Whole groups in the order of `rows`, demonstrations behind what was generated.

    Args:
        rows, copies: as for RolloutCollector.answer.
        sampling: num_samples is the size of a whole group.
        on_response: as for RolloutEngine.generate; not told of demonstrations.
    Raises:
        RuntimeError, FloatingPointError: as check_groups.
    """
    shown = {number for number, row in rows if copies and row.demonstration is not None}
    found: dict[int, list[tuple[Rollout, bool]]] = {}
    for size, is_shown in ((sampling.num_samples, False), (sampling.num_samples - copies, True)):
        prompts = [
            Prompt(id=number, tokens=row.tokens) for number, row in rows if (number in shown) == is_shown
        ]
        if not prompts:
            continue
        groups = engine.generate(prompts, replace(sampling, num_samples=size), on_response)
        check_groups(groups, prompts, size=size)
        for group in groups:
            found[group.prompt.id] = [(rollout, False) for rollout in group.rollouts]
    for number, row in rows:
        if number in shown:
            found[number] += [(_demonstrated(row), True)] * copies
    return [(number, place, *member) for number, _ in rows for place, member in enumerate(found[number])]


def _demonstrated(row: PromptRow) -> Rollout:
    """A row's own response, as if a policy had generated it that gives it probability 1."""
    assert row.demonstration is not None
    said = tuple(row.demonstration)
    return Rollout(
        prompt_tokens=row.tokens, response_tokens=said, logprobs=(0.0,) * len(said), is_finished=True
    )


def useful_groups(responses: Sequence[Response]) -> list[int]:
    """Ids of the groups that teach something, by the first reward: where all are right or all are wrong,
    there would be nothing but their lengths to learn from. What could not be judged is left out.
    """
    rewards = first_rewards(responses)
    return list(informative_groups(rewards).kept) if rewards else []


def stop_on_broken_reward(responses: Sequence[Response], *, is_first_step: bool) -> None:
    """End a run in which a reward can judge no response, on any rank: it would go on without learning.

    Raises:
        UserError, RuntimeError: with the reward's first failure. In the first step the reward is to blame;
            later what it depends on, a judge that is out of reach, say, and the job may be started again.
    """
    broken = failed_everywhere([each.scored for each in responses])
    if broken is None:
        return
    text = (
        f"reward {broken.name!r} failed on all {len(responses)} responses of a step, each tried twice; on "
        f"the first with {broken.outcome}: {broken.detail}. Nothing was trained on them"
    )
    if is_first_step:
        raise UserError(f"{text}; correct the reward, its options, reward_workers or the data")
    raise RuntimeError(f"{text}; the last checkpoint is sound")


def check_groups(groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], *, size: int) -> None:
    """Refuse what an engine must not hand over; every rank sees all groups and raises alike.

    A prompt whose responses are missing would be left out of every mean without a word, and NaN would reach
    the policy's weights.

    Raises:
        RuntimeError: a group that is empty, incomplete (fewer than `size`) or of another prompt.
        FloatingPointError: log-probabilities that are not finite.
    """
    for prompt, group in zip(prompts, groups, strict=True):
        lengths = [len(rollout.response_tokens) for rollout in group.rollouts]
        if group.prompt.id != prompt.id or len(lengths) != size or 0 in lengths:
            raise RuntimeError(
                f"rollout: expected {size} responses of at least one token to prompt {prompt.id}, got "
                f"responses of {lengths} tokens to prompt {group.prompt.id}: the engine is at fault, and "
                "nothing was trained on them"
            )
        if not all(math.isfinite(each) for rollout in group.rollouts for each in rollout.logprobs):
            raise FloatingPointError(
                f"the engine's log-probabilities of its responses to prompt {prompt.id} are NaN or infinite"
            )


# rollouts.jsonl: what the policy answered, for people to read; in step with metrics.jsonl after a resume.


class SampleLog:
    """Appends one line for each response of a step's first groups.

    Args:
        path: created, or continued.
        num_groups: written of each step, left-out groups included.
        resume_step: last step that the resumed checkpoint holds; lines of later steps, which will be taken
            again, are removed.
    Raises:
        UserError: a line that is not a JSON object with a step, or a file that cannot be read or written.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, *, num_groups: int, resume_step: int) -> None:
        self._path, self._tokenizer, self._num_groups = path, tokenizer, num_groups
        try:
            if path.exists():
                _keep_steps_up_to(path, resume_step)
            path.open("a").close()  # found now, not after the first step
        except (OSError, UnicodeDecodeError) as error:
            raise error_of(f"the samples cannot be written to {path}: {error}", error) from error

    def write(self, step: int, responses: Sequence[Response]) -> None:
        """One step's responses, group by group. Raises as JsonlSink.write()."""
        groups = list(grouped(responses).values())[: self._num_groups]
        lines = [
            json.dumps(self._sample(response, step), ensure_ascii=False) + "\n"
            for group in groups
            for response in group
        ]
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(lines)
        except OSError as error:
            raise error_of(
                f"the samples of step {step} cannot be written to {self._path}: {error}; start the run again "
                "(a full disk: after freeing space), it goes on from its last checkpoint",
                error,
            ) from error

    def _sample(self, response: Response, step: int) -> dict[str, object]:
        rollout = response.rollout
        return {
            "step": step,
            "group": response.group,
            "source": response.row.source,
            "prompt": self._tokenizer.decode(rollout.prompt_tokens),
            "response": self._tokenizer.decode(rollout.response_tokens),
            "reward": response.scored.reward,
            "rewards": {
                part.name: part.reward if part.outcome == "ok" else None for part in response.scored.parts
            },
            "outcomes": {part.name: part.outcome for part in response.scored.parts},
            "advantage": response.advantage,
            "is_demonstration": response.is_demonstration,
            "is_finished": rollout.is_finished,
            "prompt_tokens": rollout.prompt_tokens,
            "response_tokens": rollout.response_tokens,
        }


def _keep_steps_up_to(path: Path, last_step: int) -> None:
    """Remove lines of later steps, and a last line that a crash has torn."""
    # Not splitlines(): a response may hold characters that it takes for the end of a line.
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}; repair or "
                "remove the file"
            ) from None
        if step <= last_step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


# The prompts of a GRPO run, held against its rewards and its length before anything is built.


_NUM_TRIED = 8
"""Rows of each set of prompts whose own answers are scored before a run."""


def open_prompts(checked: CheckedRun[GrpoConfig]) -> tuple[PromptSet, PromptSet | None]:
    """Prompts to train on, and held-out ones where the run has some.

    Raises:
        UserError: as read_prompt_set, or epochs that do not fill a step.
    """
    data = checked.config.data
    read = partial(
        read_prompt_set,
        tokenizer=checked.tokenizer,
        max_prompt_length=data.max_prompt_length,
        columns=data.columns,
    )
    rollout = checked.config.rollout
    train = read(
        data.train_paths,
        longest_demonstration=rollout.max_new_tokens if rollout.demonstrations else None,
    )
    if data.train_weights is not None:
        train = train.with_weights(data.train_weights, data.train_paths)
    num_rollout_steps(checked.config, train)
    if not data.valid:
        return train, None
    return train, read(data.valid, key="data.valid")


def num_rollout_steps(config: GrpoConfig, prompts: PromptSet) -> int:
    """Steps of the whole run; under dynamic sampling an epoch counts the prompts of full groups.

    Raises:
        UserError: epochs that do not fill a step.
    """
    return num_training_steps(
        steps=config.train.steps,
        epochs=config.train.epochs,
        num_rows=prompts.num_drawn,
        global_size=config.rollout.prompts_per_step,
        size_key="rollout.prompts_per_step",
    )


def check_rows(rewards: Sequence[Reward], *prompts: PromptSet) -> None:
    """Raise UserError for the first row without what the rewards look at, in a form that they can read."""
    for row in (row for each in prompts for row in each.rows):
        for reward in rewards:
            try:
                reward.check_row(cast(dict[str, Json], row.values))
            except ValueError as error:
                raise UserError(f"{row.source}: {error}") from error


def try_own_answers(rewards: RewardPool, tokenizer: Tokenizer, *prompts: PromptSet) -> None:
    """Score the answers of a few rows of each set as responses; on stderr, the rows on which a reward failed.

    Raises:
        UserError: as check_own_rows.
    """
    for note in check_own_rows(rewards, _own_rows(tokenizer, *prompts)):
        LOGGER.warning(note)


def note_unearned_marks(rewards: RewardPool, tokenizer: Tokenizer, prompts: PromptSet, run_dir: Path) -> None:
    """On stderr, the rewards that pay in a few rows for what is no answer, and what looks closer."""
    for line in unearned_marks(rewards, _own_rows(tokenizer, prompts)):
        LOGGER.warning("%s; sftrl doctor reward %s", line, run_dir / "resolved.yaml")


def _own_rows(tokenizer: Tokenizer, *prompts: PromptSet) -> list[OwnRow]:
    """A few rows of each set."""
    return [
        OwnRow(
            source=each.rows[place].source,
            prompt=tokenizer.decode(each.rows[place].tokens),
            values=cast(dict[str, Json], each.rows[place].values),
        )
        for each in prompts
        for place in spread(len(each.rows), _NUM_TRIED)
    ]
