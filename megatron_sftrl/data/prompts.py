"""Rows of prompts for generation, and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sftrl.data.chat import Row, tokenize_row
from megatron_sftrl.data.template import Message
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError


def read_prompt(row: Row) -> str | Sequence[Message]:
    """The prompt that a row asks to be answered; a reference answer beside it is left alone.

    Args:
        row: `prompt` (text), or `messages` whose last turn is not the assistant's.
    Raises:
        UserError: neither is there, or the wrong type.
    """
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise UserError(f"expected either prompt or messages, got {sorted(row)}")
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt:
            raise UserError("prompt: expected a non-empty text")
        return prompt
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise UserError("messages: expected a list of turns with role and content")
    if messages[-1].get("role") == "assistant":
        raise UserError("messages: the last turn is the assistant's; remove it, it is what is generated")
    return messages


def end_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a response: the tokenizer's end token, and the one that training puts behind a turn.

    The two differ where a base model's tokenizer ends texts with one token and its chat template ends
    turns with another.
    """
    ids, mask = tokenize_row(tokenizer, {"prompt": "a", "response": "b"})
    last_learned = max(index for index, is_learned in enumerate(mask) if is_learned)
    return frozenset({tokenizer.eos_id, ids[last_learned]})
