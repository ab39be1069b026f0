"""What a rollout engine is: anything that generates groups of responses with the policy's current weights.

Every method is collective: each rank calls it with equal arguments. The engine spreads the prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.errors import UserError
from megatron_sftrl.rollout.reshard import ReshardReport
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

OnResponse = Callable[[Prompt, int, Rollout], None]
"""Told of a prompt, the number of a response to it, and the response; it must not raise: other ranks wait."""


def no_matter(prompt: Prompt, number: int, rollout: Rollout) -> None:
    """An OnResponse for those who wait for all of them."""


class RolloutEngine(Protocol):
    """Generates with the weights of the last update.

    Log-probabilities are of the sampled tokens over the whole vocabulary at the sampling temperature, before
    top-k and top-p cut it: what the trainer recomputes, so that the ratio of both is 1. An engine that cannot
    report them under a cut refuses the cut.
    """

    @property
    def last_report(self) -> ReshardReport | None:
        """What the last update cost this rank; None where no weight moves."""
        ...

    def update(self, policy: PolicyEngine, *, version: int) -> None:
        """Take over the policy's weights, and forget everything computed with earlier ones.

        Args:
            policy: between two steps, after gather_parameters.
            version: optimizer steps behind these weights; groups generated from now on carry it.
        Raises:
            UserError: on every rank, before anything is generated: a parameter of the engine that was not
                received exactly once.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_response: OnResponse = no_matter,
    ) -> list[RolloutGroup]:
        """`sampling.num_samples` responses for each prompt, in order, on every rank.

        Args:
            on_response: called on one rank for each response, when it has ended and others have not.
        Raises:
            UserError: on every rank: a prompt that is empty or too long for the engine.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that training needs until the next update(); weights and caches may be lost."""
        ...

    def close(self) -> None: ...


# When a response has come to its end: the same rule for every engine.


Decode = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens written out."""

_SPARE_TOKENS = 16
"""More than a decoder changes at the start of its input, and than tokens without a text stand in a row."""


class Stops:
    """Whether the last token of a response ends it; `decode` is needed for sampling.stop only."""

    def __init__(self, sampling: SamplingParams, decode: Decode | None) -> None:
        assert decode is not None or not sampling.stop, "an engine without decode() knows no texts"
        self._ids, self._texts, self._decode = sampling.stop_ids, sampling.stop, decode
        # Every token of the text holds at least a byte of it.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + _SPARE_TOKENS

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Asked after every token: it is an end token, or completes a text."""
        if tokens[-1] in self._ids:
            return True
        if not self._texts:
            return False
        assert self._decode is not None
        text = self._decode(tokens[-self._window :])
        return any(each in text for each in self._texts)


# What every engine asks of prompts before it generates, and the random stream of a response.


def check_prompts(
    prompts: Sequence[Prompt], sampling: SamplingParams, *, max_length: int, limit: str, vocab_size: int
) -> None:
    """Refuse prompts (equal on every rank, so that every rank raises) that an engine cannot continue.

    Args:
        max_length: tokens of prompt and response together.
        limit: what sets max_length, for the message.
    Raises:
        UserError: names the first prompt that is empty, too long, or has ids outside the vocabulary.
    """
    for prompt in prompts:
        if not prompt.tokens:
            raise UserError(f"prompt {prompt.id} is empty: expected at least one token")
        if len(prompt.tokens) + sampling.max_new_tokens > max_length:
            raise UserError(
                f"prompt {prompt.id} has {len(prompt.tokens)} tokens and with max_new_tokens "
                f"{sampling.max_new_tokens} passes the {max_length} tokens of {limit}: shorten one of them"
            )
        if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocab_size:
            raise UserError(
                f"prompt {prompt.id} has token ids from {min(prompt.tokens)} to {max(prompt.tokens)}, the "
                f"model has 0 to {vocab_size - 1}: is this the model's tokenizer?"
            )


def response_seed(seed: int, prompt: int, sample: int) -> int:
    """63 bits for an engine that seeds each response; neither batching nor replicas change them."""
    digest = hashlib.blake2b(f"{seed}:{prompt}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
