"""Rows of text to tokens and the mask of what is learned.

Two kinds of rows: {prompt, response}, and {messages: [{role, content}, ...]} with the loss on assistant
turns. What is learned is exactly what a model would have to generate: the tokens of a prompt are those
that inference feeds, the rest of the turn up to and with its end token is learned, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_sftrl.data.spans import learn_ends, tokenize_spans
from megatron_sftrl.data.template import ChatTemplate, Message
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError

Row = Mapping[str, object]
"""One row as its file holds it."""


def tokenize_row(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[bool]]:
    """Tokens of a row and which of them are learned.

    With a chat template, {prompt, response} is one user turn and one assistant turn. Without one, it is
    [first token] + prompt + response + end token.

    Args:
        tokenizer: with its chat template, if any.
        row: `prompt` and `response`, or `messages`; other keys are left alone.
    Returns:
        Ids [n] and mask [n]; the mask is False at position 0, which no position predicts.
    Raises:
        UserError: the row has no or an empty response, a wrong type, or messages that the template cannot
            render or whose assistant turns cannot be told apart from the rest exactly.
    """
    messages = read_messages(row)
    template = tokenizer.chat_template
    if template is None:
        if row.get("messages") is not None:
            raise UserError(
                "the row has messages but the tokenizer has no chat template; set tokenizer.chat_template to "
                "a Jinja file, or write rows with prompt and response"
            )
        ids, mask = _tokenize_plain(tokenizer, str(row["prompt"]), str(row["response"]))
    else:
        text, spans = assistant_spans(template, messages)
        ids, borders = tokenize_spans(tokenizer, text, spans)
        ids, mask = learn_ends(tokenizer, ids, borders)
    mask[0] = False
    if not any(mask):
        raise UserError(
            "no token of the row is learned: the chat template prints nothing for its assistant turns"
        )
    return ids, mask


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> list[int]:
    """The tokens in front of a response, the same for generation as `tokenize_row` puts there for training.

    Args:
        tokenizer: with its chat template, if any.
        prompt: text of a user turn, or the turns so far.
    Returns:
        Ids [P].
    Raises:
        UserError: messages without a chat template, or messages that the template cannot render.
    """
    template = tokenizer.chat_template
    if template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.encode(template.render(messages, add_generation_prompt=True))
    if not isinstance(prompt, str):
        raise UserError(
            "a prompt of messages needs a chat template; set tokenizer.chat_template to a Jinja file"
        )
    return _opening(tokenizer) + tokenizer.encode(prompt)


def read_messages(row: Row) -> list[Message]:
    """The conversation that a row holds, checked.

    Args:
        row: as in `tokenize_row`.
    Returns:
        The turns; keys whose value is null are left out, since columnar files fill them in.
    Raises:
        UserError: as in `tokenize_row`.
    """
    if row.get("messages") is not None:
        if row.get("prompt") is not None or row.get("response") is not None:
            raise UserError("the row has messages and also prompt or response; keep one of the two forms")
        return _check_messages(row["messages"])
    for key in ("prompt", "response"):
        if row.get(key) is None:
            raise UserError(
                f"the row has no {key}; expected prompt and response, or messages, got {sorted(row)}"
            )
        if not isinstance(row[key], str):
            raise UserError(f"{key}: expected text, got {type(row[key]).__name__}")
    if not str(row["response"]).strip():
        raise UserError("the response is empty; remove the row")
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]


def assistant_spans(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the characters that the assistant generated in it.

    A template with `{% generation %}` blocks says so itself. Without them, turn i stands between the
    conversation before it (with the header of an assistant turn) and the conversation up to it; this is
    exact as long as each of the two is a prefix of the whole, and refused otherwise.

    Args:
        template: compiled chat template.
        messages: turns in order.
    Returns:
        Text and [start, end) of each assistant turn, in order.
    Raises:
        UserError: a prefix does not hold, or the blocks are not one per assistant turn.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if template.has_generation_markers:
        text, spans = template.render_generated_spans(messages)
        if not any(start < end for start, end in spans):
            raise UserError(f"{template.origin}: its {{% generation %}} blocks are empty for these messages")
        return text, spans
    text = template.render(messages)
    spans = []
    for turn in turns:
        before = template.render(messages[:turn], add_generation_prompt=True)
        upto = template.render(messages[: turn + 1])
        if not text.startswith(before) or not text.startswith(upto) or len(upto) <= len(before):
            raise UserError(
                f"{template.origin}: the place of message {turn} (assistant) in the conversation is not "
                "exact, because the template prints earlier turns differently once later ones follow (or "
                "prints an assistant header that the turn itself does not start with). Put {% generation %} "
                "and {% endgeneration %} around the assistant text in a Jinja file and set "
                "tokenizer.chat_template, or split the conversation into rows of one assistant turn each"
            )
        spans.append((len(before), len(upto)))
    return text, spans


def _check_messages(messages: object) -> list[Message]:
    """Turns with a role and a text, at least one of them a non-empty assistant turn."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"messages: expected a list of turns, got {type(messages).__name__}")
    checked: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{number}]: expected role and content, got {type(message).__name__}")
        kept = {str(key): value for key, value in message.items() if value is not None}
        for key in ("role", "content"):
            if not isinstance(kept.get(key), str):
                raise UserError(
                    f"messages[{number}].{key}: expected text, got {type(kept.get(key)).__name__}"
                )
        if kept["role"] == "assistant" and not kept["content"].strip():
            raise UserError(f"messages[{number}]: the assistant's response is empty; remove the turn")
        checked.append(kept)
    if not any(message["role"] == "assistant" for message in checked):
        raise UserError("the row has no response: none of its messages has the role assistant")
    # Turns behind the last response teach nothing and would only cost tokens.
    last = max(number for number, message in enumerate(checked) if message["role"] == "assistant")
    return checked[: last + 1]


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The token in front of every sequence, when the tokenizer has one and wants it."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _tokenize_plain(tokenizer: Tokenizer, prompt: str, response: str) -> tuple[list[int], list[bool]]:
    text = prompt + response
    ids, [(start, _)] = tokenize_spans(tokenizer, text, [(len(prompt), len(text))])
    mask = [position >= start for position in range(len(ids))]
    opening = _opening(tokenizer)
    return [*opening, *ids, tokenizer.eos_id], [*[False] * len(opening), *mask, True]
