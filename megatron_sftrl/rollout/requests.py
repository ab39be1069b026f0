"""What every engine asks of prompts before it generates, and the random stream of a response."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_sftrl.errors import UserError
from megatron_sftrl.types import Prompt, SamplingParams


def check_prompts(
    prompts: Sequence[Prompt], sampling: SamplingParams, *, max_length: int, limit: str, vocab_size: int
) -> None:
    """Refuse prompts that an engine cannot continue.

    Args:
        prompts: equal on every rank, so that every rank raises.
        sampling: for max_new_tokens.
        max_length: tokens of prompt and response together.
        limit: what sets max_length, for the message.
        vocab_size: V.
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
    """63 bits for an engine that seeds each response; neither batching nor replicas change them.

    Args:
        seed: of SamplingParams.
        prompt: id of the prompt.
        sample: number of the response.
    """
    digest = hashlib.blake2b(f"{seed}:{prompt}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
