"""The first half of a GRPO step: prompts are drawn, answered and rewarded until there is enough to learn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.data.loader import SampleOrder
from megatron_sftrl.data.prompts import PromptRow, PromptSet
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import SharedProgress, on_every_rank
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.watch import Timers
from megatron_sftrl.rl.advantages import informative_groups
from megatron_sftrl.rl.rewards import RewardInputs, RewardPool, Scored, failed_everywhere
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.trainers.ends import response_text
from megatron_sftrl.trainers.experience import Response, first_rewards, with_advantages
from megatron_sftrl.trainers.filling import NO_DRAWS, Draws, fill, num_to_draw
from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The responses of one step.

    Args:
        responses: those that are trained on, group by group.
        generated: all of them, left-out groups included.
        num_prompts: by which the order of the data has moved.
        draws: under dynamic sampling, what became of the prompts.
        num_rounds: of generation, under dynamic sampling.
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
        self._order = SampleOrder(len(prompts.rows), seed=config.seed, shuffle=config.data.shuffle)

    def collect(
        self, engine: RolloutEngine, *, consumed: int, recent: Draws = NO_DRAWS, multiple_of: int = 1
    ) -> Collected:
        """One step's responses.

        Args:
            engine: awake, with the policy's weights.
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
        """Responses to the next prompts of the run's order, whose ids are their places in it."""
        numbers = range(start, start + count)
        rows = [self._prompts.rows[row] for row in self._order.rows(start, count)]
        return tuple(self.answer(engine, list(zip(numbers, rows, strict=True))))

    def answer(
        self,
        engine: RolloutEngine,
        rows: Sequence[tuple[int, PromptRow]],
        sampling: SamplingParams | None = None,
        *,
        phases: tuple[str, str] = ("generate", "reward"),
    ) -> list[Response]:
        """Generate, score and compare within each group.

        Args:
            engine: awake, with the policy's weights.
            rows: (id of the prompt in the run, its row).
            sampling: the run's when not given.
            phases: what the time of both halves is counted for.
        Raises:
            RuntimeError: the engine left a prompt or a response out.
            FloatingPointError: the policy's logits are NaN or infinite.
        """
        prompts = [Prompt(id=number, tokens=row.tokens) for number, row in rows]
        sampling = sampling or self._sampling
        with self._timers(phases[0]):
            groups = engine.generate(prompts, sampling)
        check_groups(groups, prompts, size=sampling.num_samples)
        with self._timers(phases[1]):
            responses = list(self._score(groups, dict(rows)))
        return with_advantages(responses, self._config.advantages.estimator)

    def _score(self, groups: Sequence[RolloutGroup], rows: dict[int, PromptRow]) -> Iterator[Response]:
        """Each rank scores every world_size-th response; then all know all rewards."""
        flat = [(group.prompt.id, rollout) for group in groups for rollout in group.rollouts]
        mine = [
            RewardInputs(
                prompt=self._tokenizer.decode(rollout.prompt_tokens),
                response=response_text(self._tokenizer, rollout.response_tokens, self._sampling),
                row=rows[number].values,  # type: ignore[arg-type]
                num_response_tokens=len(rollout.response_tokens),
                is_finished=rollout.is_finished,
            )
            for number, rollout in flat[self._parallel.rank :: self._parallel.world_size]
        ]
        shares = [[]] * self._parallel.world_size
        dist.all_gather_object(shares, on_every_rank(lambda: self._rewarded(mine)))
        for place, (number, rollout) in enumerate(flat):
            share, index = place % self._parallel.world_size, place // self._parallel.world_size
            yield Response(group=number, row=rows[number], rollout=rollout, scored=shares[share][index])

    def _rewarded(self, samples: Sequence[RewardInputs]) -> list[Scored]:
        """Ranks are done at different times, and a slow verifier may take hours: nobody waits unseen."""
        if self._progress is None:
            return self._rewards.score(samples)
        moved = self._progress.moved
        return self._progress.together(lambda: self._rewards.score(samples, moved))


def useful_groups(responses: Sequence[Response]) -> list[int]:
    """Ids of the groups that teach something, by the first reward: where all are right or all are wrong,
    there would be nothing but their lengths to learn from. What could not be judged is left out.
    """
    rewards = first_rewards(responses)
    return list(informative_groups(rewards).kept) if rewards else []


def stop_on_broken_reward(responses: Sequence[Response], *, is_first_step: bool) -> None:
    """End a run in which a reward can judge nothing: it would go on without learning.

    Args:
        responses: of one step, on all ranks.
        is_first_step: of the run, which points at the reward; later it is what the reward depends on, a judge
            that is out of reach, say, and the job may be started again.
    Raises:
        UserError, RuntimeError: see collect; with the reward and the first of its failures.
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

    Args:
        groups: from the engine.
        prompts: that it was asked to continue.
        size: responses to each.
    Raises:
        RuntimeError: a group that is empty, incomplete or of another prompt.
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
