"""The tokens that end a response."""

from __future__ import annotations

from itertools import takewhile

from megatron_sftrl.data.chat import tokenize_row
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError


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
