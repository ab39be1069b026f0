"""The first half of a GRPO step: prompts are drawn, answered and rewarded until there is enough to learn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_sftrl.config.grpo import GrpoConfig
from megatron_sftrl.data.order import SampleOrder
from megatron_sftrl.data.prompt_set import PromptRow, PromptSet
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.shared_progress import SharedProgress
from megatron_sftrl.engine.together import on_every_rank
from megatron_sftrl.observability.timers import Timers
from megatron_sftrl.rl.advantages import group_advantages
from megatron_sftrl.rl.group_filters import informative_groups
from megatron_sftrl.rl.rewards import RewardInputs, RewardPool, Scored
from megatron_sftrl.rollout.api import RolloutEngine
from megatron_sftrl.trainers.ends import response_text
from megatron_sftrl.trainers.experience import Response, grouped, with_advantages
from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The responses of one step.

    Args:
        responses: those that are trained on, group by group.
        generated: all of them, left-out groups included.
        num_prompts: drawn from the order of the data.
    """

    responses: tuple[Response, ...]
    generated: tuple[Response, ...]
    num_prompts: int


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

    def collect(self, engine: RolloutEngine, *, consumed: int) -> Collected:
        """One step's responses.

        Args:
            engine: awake, with the policy's weights.
            consumed: prompts drawn by the steps before.
        """
        wanted, filters = self._config.rollout.prompts_per_step, self._config.filters
        rounds = filters.max_rounds if filters.dynamic_sampling else 1
        kept: list[Response] = []
        generated: list[Response] = []
        num_prompts, num_groups = 0, 0
        for _ in range(rounds):
            drawn = range(consumed + num_prompts, consumed + num_prompts + wanted - num_groups)
            rows = self._order.rows(drawn.start, len(drawn))
            responses = self.answer(
                engine, [(number, self._prompts.rows[row]) for number, row in zip(drawn, rows, strict=True)]
            )
            num_prompts += len(drawn)
            generated += responses
            new = self._informative(responses) if filters.dynamic_sampling else responses
            kept += new
            num_groups += len(grouped(new))
            if num_groups == wanted:
                break
        return Collected(responses=tuple(kept), generated=tuple(generated), num_prompts=num_prompts)

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
        rewards = {
            group: [each.scored.reward for each in members] for group, members in grouped(responses).items()
        }
        advantages = group_advantages(rewards, self._config.advantages.estimator)
        return with_advantages(responses, [value for group in rewards for value in advantages[group]])

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

    def _informative(self, responses: Sequence[Response]) -> list[Response]:
        """By the first reward: a group that is all right or all wrong would teach nothing but its length."""
        groups = grouped(responses)
        rewards = {
            group: [each.scored.parts[0].reward for each in members] for group, members in groups.items()
        }
        return [each for group in informative_groups(rewards).kept for each in groups[group]]


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
