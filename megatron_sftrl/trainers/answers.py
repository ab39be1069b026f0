"""Prompts are answered by an engine, and judged: from rows to responses with rewards and advantages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch.distributed as dist

from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.together import SharedProgress, on_every_rank
from megatron_sftrl.observability.watch import Timers
from megatron_sftrl.rl.advantages import AdvantageEstimator
from megatron_sftrl.rl.rewards import RewardInputs, RewardPool, Scored, Scoring
from megatron_sftrl.rollout.api import OnResponse, RolloutEngine, no_matter
from megatron_sftrl.rollout.separate import Generation, begin
from megatron_sftrl.trainers.checked import response_text
from megatron_sftrl.trainers.experience import Response, with_advantages
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

NumberedRow = tuple[int, PromptRow]
"""The id of a prompt in the run, and its row."""


class Asked(Protocol):
    """Prompts that are being answered and judged; every rank holds one and calls it alike."""

    @property
    def seconds(self) -> float:
        """How long it took to generate the responses; known when they are."""
        ...

    def wait(self) -> None:
        """Until they are generated, by generators elsewhere; rewards are not waited for."""
        ...

    def responses(self) -> list[Response]:
        """Wait for the rewards; the same at every further call.

        Raises:
            UserError, RuntimeError: on every rank: as RewardPool.score; the engine left a response out.
            FloatingPointError: the policy's logits are NaN or infinite.
        """
        ...

    def close(self) -> None:
        """Give up what has not been waited for."""
        ...


class Answers:
    """Generates groups of responses with an engine and has them judged beside it.

    Every rank calls it and gets the same result: engines generate together, and each rank scores a share.

    Args:
        sampling: of the run, whose stop texts no reward sees.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        parallel: ParallelContext,
        rewards: RewardPool,
        sampling: SamplingParams,
        estimator: AdvantageEstimator,
        timers: Timers,
        progress: SharedProgress | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._parallel, self._rewards = engine, tokenizer, parallel, rewards
        self._sampling = sampling
        self._estimator: AdvantageEstimator = estimator
        self._timers, self._progress = timers, progress

    def ask(
        self,
        rows: Sequence[NumberedRow],
        sampling: SamplingParams | None = None,
        *,
        phases: tuple[str, str] = ("generate", "reward"),
        copies: int = 0,
    ) -> Asked:
        """Generate with an awake engine; a response is judged from its end on, also when this has returned.

        Generators elsewhere (rollout.devices) go on when this has returned. One call's rewards are waited
        for, or given up, before the next call.

        Args:
            sampling: the run's when not given.
            phases: what the time of generation, and of the wait for rewards, is counted for.
            copies: of a group's responses, those that its row's demonstration takes the place of, where the
                row has one.
        """
        sampling, row_of = sampling or self._sampling, dict(rows)
        with contextlib.ExitStack() as stack:
            scoring = stack.enter_context(Scoring(self._rewards))
            asked: list[_Place] = []

            def ask(number: int, place: int, rollout: Rollout) -> None:
                asked.append((number, place))
                scoring.add(lambda: self._reward_inputs(rollout, row_of[number]))

            with self._timers(phases[0]):
                for each in self._share_of_demonstrations(rows, sampling.num_samples, copies):
                    ask(*each)
                groups = Groups(
                    self._engine,
                    rows,
                    sampling,
                    copies=copies,
                    on_response=lambda prompt, place, rollout: ask(prompt.id, place, rollout),
                )
            stack.callback(groups.close)  # before the scoring, which it adds to

            def judge() -> list[Response]:
                with self._timers(phases[0]):
                    members = groups.members()
                with self._timers(phases[1]):
                    scored = on_every_rank(lambda: self._rewarded(scoring))
                    known = _of_every_rank(dict(zip(asked, scored, strict=True)), self._parallel)
                responses = [
                    Response(
                        group=each.prompt,
                        row=row_of[each.prompt],
                        rollout=each.rollout,
                        scored=known[each.prompt, each.place],
                        version=each.version,
                        is_demonstration=each.is_demonstration,
                    )
                    for each in members
                ]
                return with_advantages(responses, self._estimator)

            return _Asked(groups, judge, stack.pop_all(), waiting=lambda: self._timers(phases[0]))

    def answer(
        self,
        rows: Sequence[NumberedRow],
        sampling: SamplingParams | None = None,
        *,
        phases: tuple[str, str] = ("generate", "reward"),
        copies: int = 0,
    ) -> list[Response]:
        """ask(), and the wait for its rewards."""
        with contextlib.closing(self.ask(rows, sampling, phases=phases, copies=copies)) as asked:
            return asked.responses()

    def _share_of_demonstrations(
        self, rows: Sequence[NumberedRow], size: int, copies: int
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


class _Asked:
    def __init__(
        self,
        groups: Groups,
        judge: Callable[[], list[Response]],
        scoring: contextlib.ExitStack,
        *,
        waiting: Callable[[], AbstractContextManager],
    ) -> None:
        self._groups, self._judge, self._scoring, self._waiting = groups, judge, scoring, waiting
        self._responses: list[Response] | None = None

    @property
    def seconds(self) -> float:
        return self._groups.seconds

    def wait(self) -> None:
        with self._waiting():
            self._groups.wait()

    def responses(self) -> list[Response]:
        if self._responses is None:
            self._responses = self._judge()
            self.close()
        return self._responses

    def close(self) -> None:
        self._scoring.close()


_Place = tuple[int, int]
"""The id of a prompt, and the place of a response in its group."""


def _of_every_rank(mine: dict[_Place, Scored], parallel: ParallelContext) -> dict[_Place, Scored]:
    shares: list[dict[_Place, Scored] | None] = [None] * parallel.world_size
    dist.all_gather_object(shares, mine)
    return {place: scored for share in shares if share for place, scored in share.items()}


class Member(NamedTuple):
    """One of a group: the id of its prompt, its place, and the version of the weights that sampled others."""

    prompt: int
    place: int
    rollout: Rollout
    is_demonstration: bool
    version: int


class Groups:
    """Whole groups on their way, which an engine has been asked for.

    Args:
        copies: as for Answers.ask.
        sampling: num_samples is the size of a whole group.
        on_response: as for RolloutEngine.generate; not told of demonstrations.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rows: Sequence[NumberedRow],
        sampling: SamplingParams,
        *,
        copies: int,
        on_response: OnResponse = no_matter,
    ) -> None:
        self._rows, self._copies = rows, copies
        self._shown = {number: row for number, row in rows if copies and row.demonstration is not None}
        self._asked: list[tuple[list[Prompt], int, Generation]] = []
        for size, is_shown in ((sampling.num_samples, False), (sampling.num_samples - copies, True)):
            prompts = [
                Prompt(id=number, tokens=row.tokens)
                for number, row in rows
                if (number in self._shown) == is_shown
            ]
            if prompts:
                generation = begin(engine, prompts, replace(sampling, num_samples=size), on_response)
                self._asked.append((prompts, size, generation))

    @property
    def seconds(self) -> float:
        """That the engine took; known with the members."""
        return sum(generation.seconds for _, _, generation in self._asked)

    def wait(self) -> None:
        """Until the engine is done."""
        for _, _, generation in self._asked:
            generation.wait()

    def members(self) -> list[Member]:
        """In the order of the rows, demonstrations behind what was generated; collective.

        Raises:
            RuntimeError, FloatingPointError: as check_groups.
        """
        found: dict[int, RolloutGroup] = {}
        for prompts, size, generation in self._asked:
            groups = generation.groups()
            check_groups(groups, prompts, size=size)
            found |= {group.prompt.id: group for group in groups}
        members: list[Member] = []
        for number, _ in self._rows:
            group = found[number]
            rollouts = [(rollout, False) for rollout in group.rollouts]
            if number in self._shown:
                rollouts += [(_demonstrated(self._shown[number]), True)] * self._copies
            members += [
                Member(number, place, *rollout, group.version) for place, rollout in enumerate(rollouts)
            ]
        return members

    def close(self) -> None:
        """They are not wanted any more."""
        for _, _, generation in self._asked:
            generation.close()


def _demonstrated(row: PromptRow) -> Rollout:
    """A row's own response, as if a policy had generated it that gives it probability 1."""
    assert row.demonstration is not None
    said = tuple(row.demonstration)
    return Rollout(
        prompt_tokens=row.tokens, response_tokens=said, logprobs=(0.0,) * len(said), is_finished=True
    )


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
