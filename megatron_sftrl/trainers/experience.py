"""What one step of GRPO has experienced: groups of scored responses, and the batches made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.config.data import Aggregation
from megatron_sftrl.config.schema import BatchSection
from megatron_sftrl.data.examples import Example
from megatron_sftrl.data.loader import BatchLayout, StepData, lay_out_step
from megatron_sftrl.data.packing import SharedPrompt, StepNormalization
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import Ask, PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.rl.advantages import AdvantageEstimator, by_group, group_advantages
from megatron_sftrl.rl.rewards import Scored
from megatron_sftrl.types import Rollout
from megatron_sftrl.vocab_parallel import TokenDistribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response with everything that is known of it.

    Args:
        group: id of its prompt in the run.
        rollout: tokens and the engine's log-probabilities; of a demonstration 0 nats each.
        version: steps behind the weights that sampled its group.
        is_demonstration: the response that the row has, in place of one that was generated.
        advantage: against the responses of its group that have a reward; 0 without one.
        old_logprobs: nats, the trainer's own for each response token, before the first update; empty where
            nothing is learned from the response, and until they are known.
        entropies: nats, of the policy at each of them, at the sampling temperature.
    """

    group: int
    row: PromptRow
    rollout: Rollout
    scored: Scored
    version: int = 0
    is_demonstration: bool = False
    advantage: float = 0.0
    old_logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()

    def carries_loss(self, *, mask_truncated: bool, needs_reward: bool = True) -> bool:
        """It has a reward, where it needs one, and its end token where those without one are masked."""
        is_judged = self.scored.reward is not None or not needs_reward
        return is_judged and (self.rollout.is_finished or not mask_truncated)


def sampled(responses: Sequence[Response]) -> list[Response]:
    """Those that the policy has sampled."""
    return [each for each in responses if not each.is_demonstration]


def grouped(responses: Sequence[Response]) -> dict[int, list[Response]]:
    return by_group([response.group for response in responses], responses)


def known_rewards(responses: Sequence[Response]) -> dict[int, list[float]]:
    """The rewards of each group, of the responses that have one; a group in which none has is not there."""
    known = [(each.group, each.scored.reward) for each in responses if each.scored.reward is not None]
    return by_group([group for group, _ in known], [reward for _, reward in known])


def first_rewards(responses: Sequence[Response]) -> dict[int, list[float]]:
    """The same by the first reward of the run alone, which says what a success is."""
    known = [(each.group, each.scored.first) for each in responses if each.scored.first is not None]
    return by_group([group for group, _ in known], [reward for _, reward in known])


def as_example(response: Response, number: int, *, is_learned: bool) -> Example:
    """The sequence that the trainer sees: where `is_learned`, every token of the response carries loss, the
    end too.

    Token ids are taken as they were generated, never tokenized again; `number` is its place in the step.
    """
    prompt, said = response.rollout.prompt_tokens, response.rollout.response_tokens
    mask = np.zeros(len(prompt) + len(said), np.bool_)
    mask[len(prompt) :] = is_learned
    count = len(said) if is_learned else 0
    old = response.old_logprobs or (0.0,) * len(said)
    return Example(
        tokens=np.array([*prompt, *said], np.int32),
        loss_mask=mask,
        behavior_logprobs=None,
        row=number,
        source=response.row.source,
        old_logprobs=np.array(old[:count], np.float32),
        rollout_logprobs=np.array(response.rollout.logprobs[:count], np.float32),
        advantages=np.full(count, response.advantage, np.float32),
        is_demonstration=np.full(count, response.is_demonstration, np.bool_),
        experts=response.rollout.experts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperienceBatches:
    """Turns responses into the batches of one update.

    Args:
        max_length: divisor of constant_length, tokens of the longest response.
        pad_id: any valid id.
        needs_reward: the loss looks at advantages: a response without a reward carries none.
        has_demonstrations: groups may hold some, and the loss is told which tokens are theirs.
        experts_shape: (layers with experts, k) under rollout.router_replay.
        shares_prompts: a prompt is computed once for the responses of its group in a micro-batch. Under
            rollout.router_replay it visits the experts that the first of them has.
    """

    batch: BatchSection
    layout: BatchLayout
    max_length: int
    pad_id: int
    mask_truncated: bool
    needs_reward: bool = True
    has_demonstrations: bool = False
    experts_shape: tuple[int, int] | None = None
    shares_prompts: bool = False

    def has_signal(self, responses: Sequence[Response]) -> bool:
        """A response that carries loss has an advantage, where the loss looks at advantages."""
        return any(
            (each.advantage != 0 or not self.needs_reward) and self.carries_loss(each) for each in responses
        )

    def carries_loss(self, response: Response) -> bool:
        """Its tokens count in the loss."""
        return response.carries_loss(mask_truncated=self.mask_truncated, needs_reward=self.needs_reward)

    def lay_out(self, responses: Sequence[Response], *, everything: bool = False) -> StepData | None:
        """This rank's micro-batches of one update; None when no response carries loss.

        StepData.rows and microbatch_rows are places in `responses`. With `everything` every generated token
        is there, to look at log-probabilities; nothing is masked.

        Raises:
            RuntimeError: the engine gave a response without its experts, under rollout.router_replay.
        """
        if self.experts_shape and any(
            each.rollout.experts is None and not each.is_demonstration for each in responses
        ):
            raise RuntimeError(
                "rollout.router_replay: the engine gave a response without its experts: use rollout.engine: "
                "in_process, or remove router_replay"
            )
        examples = [
            as_example(
                response,
                number,
                is_learned=everything or self.carries_loss(response),
            )
            for number, response in enumerate(responses)
        ]
        num_loss_tokens = sum(example.num_loss_tokens for example in examples)
        if num_loss_tokens == 0:
            return None
        aggregation: Aggregation = self.batch.aggregation
        return lay_out_step(
            [len(example.tokens) for example in examples],
            examples.__getitem__,
            batch=self.batch,
            layout=self.layout,
            normalization=StepNormalization(
                aggregation=aggregation,
                num_loss_tokens=num_loss_tokens,
                num_sequences=sum(example.num_loss_tokens > 0 for example in examples),
                max_length=self.max_length,
            ),
            pad_id=self.pad_id,
            carried=(
                "old_logprobs",
                "rollout_logprobs",
                "advantages",
                *(("is_demonstration",) if self.has_demonstrations else ()),
            ),
            experts_shape=self.experts_shape,
            shared=_shared_prompts(responses) if self.shares_prompts else (),
        )


def _shared_prompts(responses: Sequence[Response]) -> list[SharedPrompt]:
    """Of each response, all but the last token of its group's prompt."""
    prompts = [(each.group, each.rollout.prompt_tokens) for each in responses]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [SharedPrompt(number=numbers[prompt], length=len(prompt[1]) - 1) for prompt in prompts]


def with_advantages(responses: Sequence[Response], estimator: AdvantageEstimator) -> list[Response]:
    """The same responses, each with its advantage over its group.

    A response without a reward is neither right nor wrong: it is no part of its group's mean and std, and
    gets 0; so does the only one of its group that has a reward.
    """
    rewards = known_rewards(responses)
    found = group_advantages(rewards, estimator) if rewards else {}
    values = {group: iter(advantages) for group, advantages in found.items()}
    return [
        replace(each, advantage=0.0 if each.scored.reward is None else next(values[each.group]))
        for each in responses
    ]


# What the policy says of learned tokens, collected from all ranks.


def score_responses(
    policy: PolicyEngine, data: StepData, *, temperature: float = 1.0
) -> dict[int, list[float]]:
    """Nats of each learned token, in order, by row of the step; every rank calls it and gets all of them.

    Raises:
        FloatingPointError: as look_at_tokens.
    """
    found = look_at_tokens(policy, data, partial(ask_logprobs, temperature=temperature))
    return {row: logprobs for row, (logprobs,) in found.items()}


def look_at_tokens(
    policy: PolicyEngine, data: StepData, ask: Ask, reference: ReferenceModel | None = None
) -> dict[int, list[list[float]]]:
    """What `ask` answers of each learned token, a list for each question, by row of the step.

    Every rank calls it and gets all of them.

    Raises:
        FloatingPointError: on every rank: some that are NaN or infinite.
    """
    with policy.evaluation():
        numbers = policy.token_numbers(data.batches, ask, reference)
    return by_row(numbers, data, policy.parallel)


def by_row(
    numbers: Sequence[Tensor], data: StepData, parallel: ParallelContext
) -> dict[int, list[list[float]]]:
    """Numbers of each learned token, [k, T] of each micro-batch, as look_at_tokens gives them; it raises so.

    `numbers` are empty on all but the last pipeline stage; T may be longer than the micro-batch, by padding.
    """
    mine: dict[int, list[list[float]]] = {}
    if numbers:
        for values, batch, rows in zip(
            numbers, data.batches, data.microbatch_rows[parallel.dp_rank], strict=True
        ):
            starts = batch.cu_seqlens.tolist()
            whole, mask = values.cpu(), batch.loss_mask
            for row, sequence in zip(rows, batch.complete(), strict=False):
                place = slice(starts[sequence], starts[sequence + 1])
                mine[row] = whole[:, place][:, mask[place]].tolist()
    shares: list[dict[int, list[list[float]]] | None] = [None] * parallel.world_size
    dist.all_gather_object(shares, mine)
    bad = [rank for rank, share in enumerate(shares) if not all(map(_are_finite, (share or {}).values()))]
    if bad:
        raise FloatingPointError(
            f"log-probabilities under the policy are NaN or infinite, on rank {', '.join(map(str, bad))}"
        )
    return {row: values for share in shares if share for row, values in share.items()}


def with_seen(
    responses: Sequence[Response], found: Mapping[int, Sequence[Sequence[float]]]
) -> list[Response]:
    """The responses with old_logprobs and entropies, which `found` has by their places (see by_row)."""
    return [
        replace(each, old_logprobs=tuple(found[place][0]), entropies=tuple(found[place][1]))
        for place, each in enumerate(responses)
    ]


def look_at_responses(
    policy: PolicyEngine, batches: ExperienceBatches, responses: Sequence[Response], *, temperature: float
) -> list[tuple[list[float], list[float]]]:
    """Log-probability and entropy of each generated token at the temperature, nats, for each response.

    Both are the trainer's own and over the whole vocabulary, in parts of batch.global_size responses.

    Raises:
        FloatingPointError: as look_at_tokens.
    """
    ask, size = partial(ask_logprobs_and_entropies, temperature=temperature), batches.batch.global_size
    found: list[tuple[list[float], list[float]]] = []
    for start in range(0, len(responses), size):
        data = batches.lay_out(responses[start : start + size], everything=True)
        assert data is not None, "a response has at least one token"
        of_part = look_at_tokens(policy, data, ask)
        found += [(of_part[row][0], of_part[row][1]) for row in range(len(of_part))]
    return found


# Questions for look_at_tokens.


def ask_logprobs(
    policy: TokenDistribution,
    reference: TokenDistribution | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor]:
    """log p of the labels."""
    policy = policy if temperature == 1.0 else policy.tempered(temperature)
    return (policy.logprobs(labels),)


def ask_logprobs_and_entropies(
    policy: TokenDistribution, reference: TokenDistribution | None, labels: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p of the labels, and the entropy."""
    policy = policy if temperature == 1.0 else policy.tempered(temperature)
    policy.anticipate(labels)  # both come from one look at the logits
    return policy.logprobs(labels), policy.entropy()


def ask_logprobs_and_kl(
    policy: TokenDistribution, reference: TokenDistribution | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """log p of the labels, and KL(policy || reference)."""
    assert reference is not None
    policy.anticipate(labels)
    return policy.logprobs(labels), policy.kl_to(reference)


def ask_kl_from(
    policy: TokenDistribution, reference: TokenDistribution | None, labels: Tensor
) -> tuple[Tensor]:
    """KL(reference || policy)."""
    assert reference is not None
    return (policy.kl_from(reference),)


def _are_finite(numbers: list[list[float]]) -> bool:
    return all(math.isfinite(value) for values in numbers for value in values)
