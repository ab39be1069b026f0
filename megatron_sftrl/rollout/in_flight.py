"""Responses on their way: places of finished ones go to waiting ones, a group's prompt is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist

from megatron_sftrl.engine import cpu_backend
from megatron_sftrl.engine.kv_cache import KvCache
from megatron_sftrl.engine.model import uses_transformer_engine
from megatron_sftrl.engine.next_token import next_tokens
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.rollout.packing import Packed, pack_new_tokens, pack_prefixes
from megatron_sftrl.rollout.stops import Stops
from megatron_sftrl.types import Rollout, SamplingParams

_SMALLEST_REFILL = 0.25
"""Share of the places that must be free before waiting responses interrupt those on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A response that is asked for.

    Args:
        prompt: at least one token.
        stream: (prompt's id, number of the sample): with the seed they name its random numbers.
    """

    prompt: tuple[int, ...]
    stream: tuple[int, int]


@dataclass(slots=True, kw_only=True)
class _Response:
    number: int  # in the order in which they were asked for
    prompt: tuple[int, ...]
    uniforms: np.ndarray  # [max_new_tokens] float64 in [0, 1)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


def generate_in_flight(
    policy: PolicyEngine,
    wanted: Sequence[Wanted],
    sampling: SamplingParams,
    stops: Stops,
    *,
    max_responses: int,
    max_prompts: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """One response to each; every rank of one data-parallel replica calls it with the same arguments.

    Args:
        policy: its weights are only read.
        wanted: those of one prompt stand beside each other.
        sampling: of all.
        stops: of `sampling`.
        max_responses: on their way at once; bounds the memory of cache and forward.
        max_prompts: computed in one forward.
        on_step: called after every token.
    """
    flight = _Flight(policy, sampling, stops, num_slots=min(max_responses, len(wanted)), wanted=wanted)
    waiting = list(enumerate(wanted))[::-1]
    done: dict[int, Rollout] = {}
    with policy.evaluation():
        while _anyone(bool(waiting or flight.active), policy.parallel):
            if waiting and flight.has_room:
                flight.admit(_next(waiting, flight.num_free, max_prompts))
            else:
                flight.advance()
            done.update(flight.land())
            on_step()
    return [done[number] for number in range(len(wanted))]


class _Flight:
    """The responses on their way, in the order of their slots in the cache."""

    def __init__(
        self,
        policy: PolicyEngine,
        sampling: SamplingParams,
        stops: Stops,
        *,
        num_slots: int,
        wanted: Sequence[Wanted],
    ) -> None:
        self._policy = policy
        self._sampling = sampling
        self._stops = stops
        self._num_slots = num_slots
        self._cache = None
        if policy.parallel.cp_size == 1 and not uses_transformer_engine():
            longest = max((len(each.prompt) for each in wanted), default=0) + sampling.max_new_tokens
            self._cache = KvCache(num_slots=num_slots, max_length=longest)
        self.active: list[_Response] = []

    @property
    def num_free(self) -> int:
        return self._num_slots - len(self.active)

    @property
    def has_room(self) -> bool:
        """A forward over prompts is worth while."""
        return not self.active or self.num_free >= max(1, _SMALLEST_REFILL * self._num_slots)

    def admit(self, wanted: Sequence[tuple[int, Wanted]]) -> None:
        """Take responses on, and draw their first token; each prompt is computed once."""
        first_slot = len(self.active)
        new = [
            _Response(number=number, prompt=each.prompt, uniforms=_uniforms(each.stream, self._sampling))
            for number, each in wanted
        ]
        self.active += new
        if self._cache is None:
            return self.advance()
        groups = [list(group) for _, group in groupby(range(len(new)), key=lambda i: new[i].prompt)]
        leaders = {first_slot + group[0]: new[group[0]].prompt for group in groups}
        batches, rows, places = pack_prefixes(leaders, self._policy.parallel, self._cache)
        sizes = torch.tensor([len(group) for group in groups]).split([len(each) for each in rows])
        rows = [each.repeat_interleave(size) for each, size in zip(rows, sizes, strict=True)]
        self._draw((batches, rows, places), new)
        for (slot, prompt), group in zip(leaders.items(), groups, strict=True):
            self._cache.copy(slot, range(slot + 1, slot + len(group)), len(prompt))

    def advance(self) -> None:
        """Draw one more token of each response; without any, take part in the forwards of others."""
        if self._cache is None:
            prefixes = {i: (*each.prompt, *each.tokens) for i, each in enumerate(self.active)}
            packed = pack_prefixes(prefixes, self._policy.parallel, None)
        else:
            tokens = [each.tokens[-1] for each in self.active]
            positions = [each.length - 1 for each in self.active]
            with cpu_backend.without_redirection():
                packed = pack_new_tokens(tokens, positions, self._policy.parallel, self._cache)
        self._draw(packed, self.active)

    def land(self) -> dict[int, Rollout]:
        """Take the finished ones out; the last ones move into their slots."""
        landed = {}
        for slot in range(len(self.active) - 1, -1, -1):
            response = self.active[slot]
            is_finished = self._stops(response.tokens)
            if not is_finished and len(response.tokens) < self._sampling.max_new_tokens:
                continue
            landed[response.number] = Rollout(
                prompt_tokens=response.prompt,
                response_tokens=tuple(response.tokens),
                logprobs=tuple(response.logprobs),
                is_finished=is_finished,
            )
            last = self.active.pop()
            if last is not response:
                self.active[slot] = last
                if self._cache is not None:
                    self._cache.copy(len(self.active), [slot], last.length)
        return landed

    def _draw(self, packed: Packed, responses: Sequence[_Response]) -> None:
        batches, rows, places = packed
        uniforms = torch.tensor([each.uniforms[len(each.tokens)] for each in responses], dtype=torch.float64)
        drawn = next_tokens(self._policy, batches, rows, uniforms, self._sampling, places=places)
        for each, token, logprob in zip(responses, drawn.ids.tolist(), drawn.logprobs.tolist(), strict=True):
            each.tokens.append(token)
            each.logprobs.append(logprob)


def _next(waiting: list[tuple[int, Wanted]], most: int, max_prompts: int) -> list[tuple[int, Wanted]]:
    """Take up to `most` responses to up to `max_prompts` prompts off the end of `waiting`."""
    taken: list[tuple[int, Wanted]] = []
    prompts: set[tuple[int, ...]] = set()
    while waiting and len(taken) < most:
        prompts.add(waiting[-1][1].prompt)
        if len(prompts) > max_prompts:
            break
        taken.append(waiting.pop())
    return taken


def _anyone(is_active: bool, parallel: ParallelContext) -> bool:
    """Whether a forward is due: for this replica, or for any whose tokens visit the experts on this rank."""
    if parallel.ep_size == 1:
        return is_active
    flag = torch.tensor(int(is_active), device=parallel.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _uniforms(stream: tuple[int, int], sampling: SamplingParams) -> np.ndarray:
    """[max_new_tokens] float64 in [0, 1): a counter-based stream of its own for each response."""
    generator = np.random.Generator(np.random.Philox(key=sampling.seed, counter=[0, 0, *stream]))
    return generator.random(sampling.max_new_tokens)
