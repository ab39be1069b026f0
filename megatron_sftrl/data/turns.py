"""Where the learned turns of a conversation stand in what a chat template prints.

A turn is learned in the context in which a model would be asked for it: behind the conversation before it
with the header of an assistant turn. Many templates print an earlier turn differently once later ones follow
(Qwen3 and DeepSeek-R1 cut its thoughts, gpt-oss ends it with another token), so that one text cannot hold the
contexts of all turns. Such a conversation becomes several texts, and each turn is learned in one of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile

from megatron_sftrl.config.data import Thinking
from megatron_sftrl.data.conversation import Conversation, text_of
from megatron_sftrl.data.template import THOUGHTS, ChatTemplate, Message
from megatron_sftrl.errors import UserError

LOGGER = logging.getLogger(__name__)

Span = tuple[int, int]
"""[start, end), in characters or in tokens."""

_MARK = "\ufdd3"
"""A Unicode noncharacter: never part of a text."""

_OPENED = re.compile(r"<think>\s*\Z")
_CLOSED = re.compile(r"</think>\s*\Z")
_END_OF_THOUGHT = re.compile(r"(?:\A|\n)</think>")
_LEAD = re.compile(r"\s*(?:<think>\s*)?(?:</think>\s*)?")
"""What templates print between the header and the text of a turn without thoughts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnText:
    """A text, [start, end) of each learned turn in it by its index, and the conversation up to the last one.

    `prompt` is the text before a turn that is written out behind it, since the template prints another text
    in front of a finished turn than in front of a generation; None where the template prints all of it.
    """

    text: str
    spans: Mapping[int, Span]
    conversation: Conversation
    prompt: str | None = None


def turn_texts(template: ChatTemplate, conversation: Conversation, thinking: Thinking) -> list[TurnText]:
    """The texts in which the learned turns stand, each turn in one of them, in the order of their last turns.

    Turn i stands between the conversation before it (with the header of an assistant turn, as generation
    asks for it) and the conversation up to it. A text holds every turn for which both are prefixes of it.
    A template with `{% generation %}` blocks says itself what is learned, in one text, and the conversation
    before a turn has to end where its block starts.

    Raises:
        UserError: generation would not be asked for a turn where the template prints it.
    """
    if thinking == "cut":
        conversation = _without_thoughts(conversation)
    if template.has_generation_markers:
        return [_marked_text(template, conversation)]
    left = list(conversation.learned)
    texts: list[TurnText] = []
    while left:
        found = _plain_text(template, conversation, left, thinking)
        texts.append(found)
        left = [turn for turn in left if turn not in found.spans]
    return texts[::-1]


def asked_text(template: ChatTemplate, conversation: Conversation, turn: int) -> str:
    """What generation is given when it is asked for a turn."""
    return template.render(
        conversation.messages[:turn], add_generation_prompt=True, given=conversation.variables
    )


def _plain_text(
    template: ChatTemplate, conversation: Conversation, left: Sequence[int], thinking: Thinking
) -> TurnText:
    """The conversation up to the last turn that is left, with those of them that it shows as generated."""
    *earlier, last = left
    text = template.render(conversation.messages[: last + 1], given=conversation.variables)
    span = _exact_span(template, conversation, last, text)
    if span is None:
        return _written_out(template, conversation, last, text, thinking)
    spans = {}
    for turn in earlier:
        upto = template.render(conversation.messages[: turn + 1], given=conversation.variables)
        if text.startswith(upto) and (found := _exact_span(template, conversation, turn, upto)) is not None:
            spans[turn] = found
    spans[last] = span
    return TurnText(text=text, spans=spans, conversation=conversation.upto(last, learned=tuple(spans)))


def _exact_span(template: ChatTemplate, conversation: Conversation, turn: int, upto: str) -> Span | None:
    """Where `upto` has its last turn, behind what generation is given; None where it cannot be told."""
    before = _asked_before(template, conversation, turn, upto)
    if before is None:
        return None
    content = text_of(conversation.messages[turn])
    # Printed in another form, thoughts are not those of the row.
    if "</think>" in content and content.strip() not in upto[len(before) :]:
        return None
    return len(before), len(upto)


def _asked_before(template: ChatTemplate, conversation: Conversation, turn: int, upto: str) -> str | None:
    """The part of `upto` that generation is given when it is asked for its last turn; None: no part is."""
    error = None
    try:
        before = asked_text(template, conversation, turn)
        if upto.startswith(before) and len(upto) > len(before):
            return before
    except UserError as refused:
        if turn:
            raise
        error = refused
    if turn == 0 and (before := _before_an_opening(template, conversation)) is not None:
        return before if upto.startswith(before) else None
    if error is not None:
        raise error
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What stands in front of an assistant's text, as the template prints it behind a plain question.

    `header` is what a generation and a finished turn have in common, `opener` the `<think>` that only a
    generation is given, `lead` what only a finished turn has, such as a thought without text.
    """

    header: str
    opener: str
    lead: str


def _header(template: ChatTemplate, conversation: Conversation) -> _Header | None:
    question: Message = {"role": "user", "content": "a"}
    given = conversation.variables
    told = template.render([question], given=given)
    asked, opener = _split_opener(template.render([question], add_generation_prompt=True, given=given))
    head, _ = _frame(template, conversation, [question])
    if not asked.startswith(told) or not head.startswith(asked):
        return None
    return _Header(header=asked[len(told) :], opener=opener, lead=head[len(asked) :])


def _split_opener(asked: str) -> tuple[str, str]:
    opened = _OPENED.search(asked)
    return (asked, "") if opened is None else (asked[: opened.start()], opened.group())


def _frame(
    template: ChatTemplate, conversation: Conversation, messages: Sequence[Message]
) -> tuple[str, str]:
    """What the template prints before and behind the text of an assistant turn that follows messages."""
    probe = {"role": "assistant", "content": _MARK}
    head, mark, tail = template.render([*messages, probe], given=conversation.variables).rpartition(_MARK)
    if not mark:
        raise UserError(f"{template.origin} does not print the text of an assistant turn")
    return head, tail


def _before_an_opening(template: ChatTemplate, conversation: Conversation) -> str | None:
    """What stands before an assistant turn that opens the conversation, up to and with its header.

    Few templates can be asked for one, since they look at the first message.
    """
    found = _header(template, conversation)
    head, _ = _frame(template, conversation, [])
    if found is None or not found.header or found.opener:
        return None
    before = head.removesuffix(found.lead)
    return before if before.endswith(found.header) else None


# A turn written out behind what generation is given. Templates are made for serving, where a finished turn is
# history: its thoughts are not read again, and a system text may be printed with the last question alone.


def _written_out(
    template: ChatTemplate, conversation: Conversation, turn: int, upto: str, thinking: Thinking
) -> TurnText:
    """The text of a turn behind what generation is given: as the template prints it, thoughts as written.

    Where generation is given `<think>` already, the text goes on behind that.
    """
    message = conversation.messages[turn]
    before = asked_text(template, conversation, turn)
    asked, opener = _split_opener(before)
    found = _header(template, conversation)
    head, tail = _frame(template, conversation, conversation.messages[:turn])
    content = text_of(message)
    # An unclosed thought, cut in the middle, goes on behind the opened one, too.
    hides = "</think>" in content or (bool(opener) and content.lstrip().startswith("<think>"))
    places = [*(["its text"] if hides else []), *(key for key in THOUGHTS if message.get(key))]
    if len(places) > 1:
        raise UserError(
            f"{conversation.names[turn]} has thoughts in {' and in '.join(places)}; keep them in one place"
        )
    if places and _CLOSED.search(before):
        raise UserError(
            f"{conversation.names[turn]} has thoughts, but {template.origin} asks for an answer without any "
            "(see chat_template_kwargs); set data.thinking: cut to leave them out"
        )
    if (
        found is None
        or found.opener != opener
        or not asked.endswith(found.header)
        or not (shown := head.removesuffix(found.lead)).endswith(found.header)
        or not upto.startswith(shown)
        or ((hides or opener) and not _LEAD.fullmatch(found.lead))
        or (hides and message.get("tool_calls"))
    ):
        raise UserError(_not_exact(template, conversation, turn))
    if hides:
        body = _continued(content, opener) + tail
    else:
        body = _thought_before(template, message, found, thinking) + upto[len(shown) :]
    return TurnText(
        text=before + body,
        spans={turn: (len(before), len(before) + len(body))},
        conversation=conversation.upto(turn, learned=(turn,)),
        prompt=before,
    )


def _continued(content: str, opener: str) -> str:
    """What is generated of a text that may begin with the `<think>` that generation is given."""
    inner = content.lstrip()
    if not opener or not inner.startswith("<think>"):
        return content
    return inner.removeprefix("<think>").removeprefix(opener.removeprefix("<think>"))


def _thought_before(template: ChatTemplate, message: Message, found: _Header, thinking: Thinking) -> str:
    """The thought of a turn and its end, as generated behind `<think>`; empty where none is to be written."""
    thought = next((str(message[key]) for key in THOUGHTS if message.get(key)), "")
    if not found.opener:
        return ""
    if "</think>" in found.lead:
        return thought
    if thought or thinking == "cut":
        return f"{thought}\n</think>\n\n" if found.opener.endswith("\n") else f"{thought}</think>"
    _tell_of_open_thought(template.origin)
    return ""


@cache
def _tell_of_open_thought(origin: str) -> None:
    LOGGER.warning(
        "%s opens <think> for a generation, and there are rows without thoughts: their text is learned as it "
        "stands, inside of a thought that nothing closes. data.thinking: cut closes it before the answer",
        origin,
    )


def _without_thoughts(conversation: Conversation) -> Conversation:
    messages = list(conversation.messages)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        kept = {key: value for key, value in message.items() if key not in THOUGHTS}
        answer = _answer_of(text_of(message))
        if turn in conversation.learned and not (answer or "").strip() and not kept.get("tool_calls"):
            raise UserError(
                f"{conversation.names[turn]}: without its thoughts nothing is left of it (data.thinking: "
                "cut); remove the row, or keep the thoughts"
            )
        messages[turn] = kept if answer is None or answer == text_of(message) else {**kept, "content": answer}
    return replace(conversation, messages=tuple(messages))


def _answer_of(content: str) -> str | None:
    """What stands behind the thought that a text begins with, if it does; None where that is not closed.

    A thought begins with `<think>`, or has only the end, in a line of its own, as a model writes it behind an
    opened one. The words </think> in the middle of an answer are no thought.
    """
    if content.lstrip().startswith("<think>"):
        _, closed, answer = content.partition("</think>")
        return answer.lstrip("\n") if closed else None
    if "<think>" not in content and (found := _END_OF_THOUGHT.search(content)):
        return content[found.end() :].lstrip("\n")
    return content


def _not_exact(template: ChatTemplate, conversation: Conversation, turn: int) -> str:
    return (
        f"{template.origin}: {_name(conversation, turn)} (assistant) is not printed where generation would "
        "be asked for it, so that it is not known what to learn. Three ways out: {% generation %} and "
        "{% endgeneration %} around the assistant's text in a Jinja file that tokenizer.chat_template names; "
        "tokenizer.chat_template_kwargs, where the template has a switch; a row for each assistant turn, as "
        "prompt and response"
    )


# Templates that say themselves what is generated.


def _marked_text(template: ChatTemplate, conversation: Conversation) -> TurnText:
    """The conversation and the blocks of its learned turns, each of which starts where generation would.

    A turn without a block is not learned, unless it asks to be.
    """
    messages, given = conversation.messages, conversation.variables
    text, blocks = template.render_generated_spans(messages, given=given)
    blocks = [(start, end) for start, end in blocks if start < end]
    if not blocks:
        raise UserError(f"{template.origin}: its {{% generation %}} blocks are empty for these messages")
    before = {
        turn: asked_text(template, conversation, turn)
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
    return TurnText(text=text, spans=spans, conversation=conversation)


def _shared(one: str, two: str) -> int:
    """How many characters two texts have in common from their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _name(conversation: Conversation, turn: int) -> str:
    """A turn by its number in the row, which a column system is not counted in."""
    return f"message {turn - conversation.names.count('system')}"


def _misplaced(
    template: ChatTemplate, conversation: Conversation, before: Mapping[int, str], text: str, start: int
) -> str:
    """Why no turn starts where a block does: the turn that comes nearest, and where the two part."""
    turn, asked = min(before.items(), key=lambda item: abs(len(item[1]) - start))
    same = _shared(asked, text[:start])
    return (
        f"{template.origin}: a {{% generation %}} block does not start where generation does, so that "
        f"what is learned is not what the model is asked for. Before {_name(conversation, turn)} (assistant) "
        f"generation is given a text that ends in {asked[max(0, same - 20) :]!r}, the block starts behind "
        f"{text[max(0, same - 20) : start]!r}; put the block directly behind the header that "
        "add_generation_prompt prints, one block for each assistant turn"
    )
