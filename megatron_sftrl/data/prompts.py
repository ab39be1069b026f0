"""Rows of prompts for generation, and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

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
    return frozenset({tokenizer.eos_id, _end_of_turn(tokenizer)})


def _end_of_turn(tokenizer: Tokenizer) -> int:
    """The last token of a learned turn."""
    try:
        ids, mask = tokenize_row(tokenizer, {"prompt": "a", "response": "b"})
    except UserError:
        # No row of text trains this template as it is: it opens <think> for a generation and prints finished
        # turns without their thoughts, say. What it prints behind a turn still ends one.
        return _printed_end_of_turn(tokenizer)
    return ids[max(index for index, is_learned in enumerate(mask) if is_learned)]


def _printed_end_of_turn(tokenizer: Tokenizer) -> int:
    """The last special token that the template prints behind an answer, with only white space behind it."""
    assert tokenizer.chat_template is not None, "without a template every row of text can be tokenized"
    question = {"role": "user", "content": "a"}
    texts = []
    for answer in ("b", "c"):
        try:
            texts.append(tokenizer.chat_template.render([question, {"role": "assistant", "content": answer}]))
        except UserError:
            return tokenizer.eos_id  # a template of prompts alone prints no end
    if texts[0] == texts[1]:
        return tokenizer.eos_id  # it prints no answer either
    # What stands behind the answer is equal in both texts.
    pairs = zip(reversed(texts[0]), reversed(texts[1]), strict=False)
    behind = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]
    ids = tokenizer.encode_continuation(behind)
    places = [index for index, token in enumerate(ids) if token in tokenizer.special_ids]
    if not places or tokenizer.decode(ids[places[-1] + 1 :]).strip():
        return tokenizer.eos_id
    return ids[places[-1]]
