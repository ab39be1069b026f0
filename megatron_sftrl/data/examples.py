"""One tokenized demonstration, and what happens to it when it is too long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.errors import UserError

Truncation = Literal["error", "drop", "right", "left_prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence whose mask lies on the tokens themselves; packing alone shifts it to predicting positions.

    Args:
        tokens: [n] int32, prompt and response.
        loss_mask: [n] bool, True where the token is learned; never at position 0, which nothing predicts.
        behavior_logprobs: [k] fp32 nats, one per True of loss_mask, in order; None without scores.
        row: number of the row over all sources, from 0.
        source: where the row stands, such as `train.jsonl:17`.
        old_logprobs, rollout_logprobs, advantages: [k] fp32, of a response in a group; None elsewhere.
        is_demonstration: [k] bool, of a response in a group; None elsewhere.
        experts: [n - 1, layers with experts, k] as in Rollout, of a response in a group; None where no engine
            has said them.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    behavior_logprobs: NDArray[np.float32] | None
    row: int
    source: str
    old_logprobs: NDArray[np.float32] | None = None
    rollout_logprobs: NDArray[np.float32] | None = None
    advantages: NDArray[np.float32] | None = None
    is_demonstration: NDArray[np.bool_] | None = None
    experts: NDArray[np.integer] | None = None

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are learned."""
        return int(self.loss_mask.sum())

    @property
    def loss_token_ids(self) -> NDArray[np.int32]:
        """[k] int32, the ids that behaviour scores belong to."""
        return self.tokens[self.loss_mask]


def truncate(
    example: Example, *, max_length: int, truncation: Truncation, keep_first: bool
) -> Example | None:
    """Bring a sequence down to `max_length` tokens the way the user asked for; None when it is dropped.

    right cuts the end (the end token with it); left_prompt cuts the start of the prompt, and with
    `keep_first` leaves the first token, which opens every sequence, in its place. The example itself is
    never modified, and returned when it fits.

    Raises:
        UserError: it is too long and truncation is `error`; nothing of the response would remain; or with
            left_prompt the response alone does not fit.
    """
    num_tokens = len(example.tokens)
    if num_tokens <= max_length:
        return example
    if truncation == "drop":
        return None
    if truncation == "error":
        raise UserError(
            f"{example.source}: expected at most data.max_length = {max_length} tokens, got {num_tokens}; "
            "raise data.max_length or set data.truncation to drop, right or left_prompt"
        )
    if truncation == "right":
        return _cut_right(example, max_length)
    return _cut_prompt(example, max_length, keep_first=keep_first)


def _cut_right(example: Example, max_length: int) -> Example:
    mask = example.loss_mask[:max_length]
    kept = int(mask.sum())
    if kept == 0:
        first = int(np.argmax(example.loss_mask))
        raise UserError(
            f"{example.source}: the response is fully truncated: it starts at token {first} and "
            f"data.max_length is {max_length}; raise data.max_length or set data.truncation to left_prompt "
            "or drop"
        )
    scores = example.behavior_logprobs
    return replace(
        example,
        tokens=example.tokens[:max_length],
        loss_mask=mask,
        behavior_logprobs=None if scores is None else scores[:kept],
    )


def _cut_prompt(example: Example, max_length: int, *, keep_first: bool) -> Example:
    excess = len(example.tokens) - max_length
    first_learned = int(np.argmax(example.loss_mask))
    start = 1 if keep_first else 0
    # One token has to stay in front of the response: the first learned token is predicted from it.
    removable = first_learned - max(start, 1)
    if excess > removable:
        rest = len(example.tokens) - removable
        raise UserError(
            f"{example.source}: cutting the prompt is not enough: {rest} tokens remain without it and "
            f"data.max_length is {max_length}; raise data.max_length or set data.truncation to right or drop"
        )
    kept = np.r_[0:start, start + excess : len(example.tokens)]
    return replace(example, tokens=example.tokens[kept], loss_mask=example.loss_mask[kept])
