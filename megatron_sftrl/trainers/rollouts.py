"""The first half of a GRPO step: prompts are drawn, answered and rewarded until there is enough to learn."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.loader import SampleOrder, num_training_steps
from megatron_sftrl.data.prompts import PromptSet, read_prompt_set
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.rl.advantages import informative_groups
from megatron_sftrl.rl.rewards import (
    OwnRow,
    Reward,
    RewardPool,
    check_own_rows,
    failed_everywhere,
    spread,
    unearned_marks,
)
from megatron_sftrl.rl.rewards.registry import Json
from megatron_sftrl.trainers.answers import Answers, Asked
from megatron_sftrl.trainers.checked import CheckedRun
from megatron_sftrl.trainers.experience import Response, first_rewards, grouped

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
        seconds: that it took to generate them.
    """

    responses: tuple[Response, ...]
    generated: tuple[Response, ...]
    num_prompts: int
    draws: Draws = NO_DRAWS
    num_rounds: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A step whose first draw has been asked.

    Args:
        consumed: prompts drawn by the steps before.
        recent: draws of the step before, under dynamic sampling.
        count: prompts of the draw.
    """

    consumed: int
    recent: Draws
    count: int
    asked: Asked


class RolloutCollector:
    """Draws prompts in the run's order and has them answered until there is enough to learn from.

    Every rank calls it and gets the same result.
    """

    def __init__(self, config: GrpoConfig, prompts: PromptSet, answers: Answers) -> None:
        self._config = config
        self._prompts = prompts
        self._answers = answers
        self._order = SampleOrder(
            len(prompts.rows), seed=config.seed, shuffle=config.data.shuffle, mixture=prompts.mixture
        )

    def begin(self, *, consumed: int, recent: Draws = NO_DRAWS) -> Begun:
        """Ask a step's first draw; the engine is awake. The arguments are as in Begun."""
        wanted, count = self._config.rollout.prompts_per_step, self._config.rollout.prompts_per_step
        if self._config.filters.dynamic_sampling:
            count = num_to_draw(wanted, seen=recent, wanted=wanted)
        return Begun(consumed=consumed, recent=recent, count=count, asked=self._ask(consumed, count))

    def collect(self, begun: Begun, *, multiple_of: int = 1) -> Collected:
        """The responses of a step; the engine is awake, since dynamic sampling may draw further prompts.

        Args:
            multiple_of: under dynamic sampling groups are trained in multiples of it.
        Raises:
            UserError: a reward failed on every response of the run's first step.
            RuntimeError: it did so in a later step.
        """
        wanted, filters, consumed = (
            self._config.rollout.prompts_per_step,
            self._config.filters,
            begun.consumed,
        )
        generated = tuple(begun.asked.responses())
        stop_on_broken_reward(generated, is_first_step=consumed == 0)
        if not filters.dynamic_sampling:
            return Collected(
                responses=generated, generated=generated, num_prompts=wanted, seconds=begun.asked.seconds
            )
        useful = useful_groups(generated)
        draws, num_rounds, seconds = Draws(drawn=begun.count, useful=len(useful)), 1, begun.asked.seconds
        while num_rounds < filters.max_rounds and len(useful) < wanted:
            count = num_to_draw(wanted - len(useful), seen=begun.recent + draws, wanted=wanted)
            with contextlib.closing(self._ask(consumed + draws.drawn, count)) as asked:
                responses = asked.responses()
            seconds += asked.seconds
            generated += tuple(responses)
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
            seconds=seconds,
        )

    def _ask(self, start: int, count: int) -> Asked:
        """Groups for the next prompts of the run's order, whose ids are their places in it."""
        numbers = range(start, start + count)
        rows = [self._prompts.rows[row] for row in self._order.rows(start, count)]
        copies = self._config.rollout.demonstrations
        return self._answers.ask(list(zip(numbers, rows, strict=True)), copies=copies)


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
