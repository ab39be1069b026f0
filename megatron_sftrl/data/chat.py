"""Rows of text to tokens and the mask of what is learned.

Two kinds of rows: {prompt, response}, and {messages: [{role, content}, ...]} with the loss on assistant
turns. What is learned is exactly what a model would have to generate: the tokens of a prompt are those
that inference feeds, the rest of the turn up to and with its end token is learned, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_sftrl.data.conversation import Conversation, Row, read_demonstration, read_prompt
from megatron_sftrl.data.nothing_lost import check_nothing_lost
from megatron_sftrl.data.spans import Span, learn_ends, tokenize_spans
from megatron_sftrl.data.template import ChatTemplate, Message
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError


def tokenize_row(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[bool]]:
    """Tokens of a row and which of them are learned.

    With a chat template, {prompt, response} is one user turn and one assistant turn. Without one, it is
    [first token] + prompt + response + end token.

    Args:
        tokenizer: with its chat template, if any.
        row: as `read_demonstration` reads it.
    Returns:
        Ids [n] and mask [n]; the mask is False at position 0, which no position predicts.
    Raises:
        UserError: the row has no or an empty response, a wrong type, something that would be lost, or
            messages that the template cannot render or whose assistant turns cannot be told apart from the
            rest exactly.
    """
    conversation = read_demonstration(row)
    template = tokenizer.chat_template
    if template is None:
        ids, mask = _tokenize_plain(tokenizer, *_plain_texts(conversation))
    else:
        text, spans = assistant_spans(template, conversation)
        check_nothing_lost(template, conversation, text, spans)
        if template.has_generation_markers:
            _check_ends(tokenizer, template, conversation, text, spans)
        ids, borders = tokenize_spans(tokenizer, text, list(spans.values()))
        ids, mask = learn_ends(tokenizer, ids, borders)
    mask[0] = False
    if not any(mask):
        raise UserError(
            "no token of the row is learned: the chat template prints nothing for its assistant turns"
        )
    return ids, mask


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Message] | Conversation) -> list[int]:
    """The tokens in front of a response, the same for generation as `tokenize_row` puts there for training.

    Args:
        tokenizer: with its chat template, if any.
        prompt: text of a user turn, the turns so far, or what `read_prompt` made of a row.
    Returns:
        Ids [P].
    Raises:
        UserError: messages without a chat template, messages that the template cannot render, or something
            that would be lost.
    """
    conversation = prompt
    if not isinstance(conversation, Conversation):
        conversation = read_prompt({"prompt" if isinstance(prompt, str) else "messages": prompt})
    template = tokenizer.chat_template
    if template is None:
        (plain,) = _plain_texts(conversation)
        return _opening(tokenizer) + tokenizer.encode(plain)
    text = template.render(conversation.messages, add_generation_prompt=True, given=conversation.given)
    check_nothing_lost(template, conversation, text, {})
    return tokenizer.encode(text)


def assistant_spans(template: ChatTemplate, conversation: Conversation) -> tuple[str, dict[int, Span]]:
    """The rendered conversation and the characters that the assistant has to generate in it.

    Turn i stands between the conversation before it (with the header of an assistant turn, as generation
    asks for it) and the conversation up to it; this is exact as long as each of the two is a prefix of the
    whole, and refused otherwise. Where the template has `{% generation %}` blocks they say what is learned
    and where it ends, and the conversation before a turn has to end where its block starts.

    Args:
        template: compiled chat template.
        conversation: turns in order.
    Returns:
        Text and [start, end) of each learned turn by its index, in order.
    Raises:
        UserError: a prefix does not hold, or a block does not start where a turn does.
    """
    if template.has_generation_markers:
        return _marked_spans(template, conversation)
    messages, given = conversation.messages, conversation.given
    text = template.render(messages, given=given)
    spans = {}
    for turn in conversation.learned:
        before = template.render(messages[:turn], add_generation_prompt=True, given=given)
        upto = template.render(messages[: turn + 1], given=given)
        if not text.startswith(before) or not text.startswith(upto) or len(upto) <= len(before):
            raise UserError(
                f"{template.origin}: the place of {_name(conversation, turn)} (assistant) in the "
                "conversation is not exact, because the template prints earlier turns differently once later "
                "ones follow (or prints an assistant header that the turn itself does not start with). Put "
                "{% generation %} and {% endgeneration %} around the assistant text in a Jinja file and set "
                "tokenizer.chat_template, or split the conversation into rows of one assistant turn each"
            )
        spans[turn] = (len(before), len(upto))
    return text, spans


def _marked_spans(template: ChatTemplate, conversation: Conversation) -> tuple[str, dict[int, Span]]:
    """The blocks of the learned turns, each of which starts where generation would."""
    messages, given = conversation.messages, conversation.given
    text, blocks = template.render_generated_spans(messages, given=given)
    blocks = [(start, end) for start, end in blocks if start < end]
    if not blocks:
        raise UserError(f"{template.origin}: its {{% generation %}} blocks are empty for these messages")
    before = {
        turn: template.render(messages[:turn], add_generation_prompt=True, given=given)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    spans: dict[int, Span] = {}
    for start, end in blocks:
        turn = next((turn for turn, asked in before.items() if asked == text[:start]), None)
        if turn is None:
            raise UserError(_misplaced(template, conversation, before, text, start))
        if turn in conversation.learned:
            spans[turn] = (start, end)
    for turn in conversation.asked:
        if turn not in spans:
            raise UserError(
                f"{conversation.names[turn]} says that it is learned, but {template.origin} has no "
                "{% generation %} block for it; remove the key, or put a block around the turn"
            )
    if not spans:
        raise UserError(f"{template.origin}: no {{% generation %}} block is one of a turn that is learned")
    return text, spans


def _name(conversation: Conversation, turn: int) -> str:
    """A turn by its number in the row, which a column system is not counted in."""
    return f"message {turn - conversation.names.count('system')}"


def _misplaced(
    template: ChatTemplate, conversation: Conversation, before: Mapping[int, str], text: str, start: int
) -> str:
    """Why no turn starts where a block does: the turn that comes nearest, and where the two part."""
    turn, asked = min(before.items(), key=lambda item: abs(len(item[1]) - start))
    name = _name(conversation, turn)
    same = next(
        (i for i, (a, b) in enumerate(zip(asked, text[:start], strict=False)) if a != b),
        min(len(asked), start),
    )
    return (
        f"{template.origin}: a {{% generation %}} block does not start where generation does, so that "
        f"what is learned is not what the model is asked for. Before {name} (assistant) generation is given "
        f"a text that ends in {asked[max(0, same - 20) :]!r}, the block starts behind "
        f"{text[max(0, same - 20) : start]!r}; put the block directly behind the header that "
        "add_generation_prompt prints, one block for each assistant turn"
    )


def _check_ends(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversation: Conversation,
    text: str,
    spans: Mapping[int, Span],
) -> None:
    """Behind a block, its turn goes on with nothing but an end token and white space.

    Raises:
        UserError: the turn goes on, or the block is longer than the turn.
    """
    for turn, (_, end) in spans.items():
        upto = template.render(conversation.messages[: turn + 1], given=conversation.given)
        if not text.startswith(upto):
            # The template ends this turn in another way once others follow: the whole text counts.
            continue
        rest = tokenizer.encode_continuation(text[end : len(upto)]) if end < len(upto) else []
        left = tokenizer.decode([i for i in rest if i not in tokenizer.special_ids])
        if left.strip():
            raise UserError(
                f"{template.origin} prints {left!r} behind {conversation.names[turn]}, outside of its "
                "generation block, so that no end would be learned; close the block behind that text"
            )
        if end > len(upto):
            raise UserError(
                f"{template.origin}: the generation block of {conversation.names[turn]} goes on behind the "
                f"turn, with {text[len(upto) : end]!r}; close it where the turn ends"
            )


def _plain_texts(conversation: Conversation) -> list[str]:
    """Prompt and response, when there is no chat template to print anything else."""
    if conversation.is_plain:
        return [str(message["content"]) for message in conversation.messages]
    asks = [*(name for name in conversation.names if name == "system"), *conversation.given]
    raise UserError(
        f"the row has {', '.join(asks) or 'messages'} but the tokenizer has no chat template; set "
        "tokenizer.chat_template to a Jinja file, or write rows with prompt and response alone"
    )


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The token in front of every sequence, when the tokenizer has one and wants it."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _tokenize_plain(tokenizer: Tokenizer, prompt: str, response: str) -> tuple[list[int], list[bool]]:
    text = prompt + response
    ids, [(start, _)] = tokenize_spans(tokenizer, text, [(len(prompt), len(text))])
    mask = [position >= start for position in range(len(ids))]
    opening = _opening(tokenizer)
    return [*opening, *ids, tokenizer.eos_id], [*[False] * len(opening), *mask, True]
