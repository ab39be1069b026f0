"""Rows of text to tokens and the mask of what is learned.

Two kinds of rows: {prompt, response}, and {messages: [{role, content}, ...]} with the loss on assistant
turns; formats.py finds them in the columns of other formats. What is learned is exactly what a model would
have to generate: the tokens of a prompt are those that inference feeds, the rest of the turn up to and with
its end token is learned, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_sftrl.config.data import ALL_TURNS, Learning
from megatron_sftrl.data.conversation import (
    Conversation,
    Row,
    as_template_reads,
    changes_arguments,
    functions_of,
    is_empty,
    read_demonstration,
    read_prompt,
    text_of,
)
from megatron_sftrl.data.template import THOUGHTS, ChatTemplate, Message
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.data.turns import Span, TurnText, asked_text, turn_texts
from megatron_sftrl.errors import UserError


def tokenize_spans(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Tokens of a text, none of which crosses the border of a span, and the spans in tokens.

    `spans` are in characters, ascending, not overlapping. Where the tokens of text[:border] are the first
    tokens of the text, they are taken as they are. Where the tokenizer would merge across a border (a
    response that starts with a newline behind a header that ends in one), the parts are tokenized apart, as
    they are when a model generates: it is given the tokens of text[:border] and continues.

    Raises:
        UserError: the parts, tokenized apart, no longer read as the same text.
    """
    whole = tokenizer.encode(text)
    return _as_a_whole(tokenizer, text, spans, whole) or _apart(tokenizer, text, spans, whole)


def _as_a_whole(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span], whole: list[int]
) -> tuple[list[int], list[Span]] | None:
    """The tokens of the text where they have a border at every border of a span, else None."""
    prefixes = [_encode_prefix(tokenizer, text, cut, whole) for span in spans for cut in span]
    if any(whole[: len(prefix)] != prefix for prefix in prefixes):
        return None
    borders = [len(prefix) for prefix in prefixes]
    return whole, list(zip(borders[::2], borders[1::2], strict=True))


def _apart(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span], whole: list[int]
) -> tuple[list[int], list[Span]]:
    cuts = [cut for span in spans for cut in span]
    ids: list[int] = []
    borders = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        if start < end:
            part = text[start:end]
            behind = ids[-1] if ids else None
            ids += tokenizer.encode_continuation(part, behind=behind) if start else tokenizer.encode(part)
        borders.append(len(ids))
    if tokenizer.decode(ids) != tokenizer.decode(whole):
        raise UserError(
            "a token crosses the border between prompt and response, and tokenized apart they read as "
            "another text; end the prompt (or the template's assistant header) where a new token starts"
        )
    return ids, list(zip(borders[:-1:2], borders[1::2], strict=True))


def learn_ends(
    tokenizer: Tokenizer, ids: Sequence[int], spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """Ids [m] and mask [m] of a conversation whose last turn is the assistant's, up to its learned end token.

    Learned are the spans (in tokens, ascending) and the token that ends each. An end token printed directly
    behind a span (a `{% generation %}` block that closes before it) belongs to the turn. White space behind
    an end token does not: generation has stopped there. Where the template ends the last turn with no
    special token, the tokenizer's end token is appended.

    Raises:
        UserError: text that is not learned stands between the last span and the end.
    """
    tail = next((i for i in ids[spans[-1][1] :] if i in tokenizer.special_ids), tokenizer.eos_id)
    ends = {tokenizer.eos_id, tail}
    mask = [False] * len(ids)
    stop = 0
    for start, end in spans:
        if start < end:
            stop = _end_of_turn(tokenizer, ids, start, end, ends)
            mask[start:stop] = [True] * (stop - start)
            if {ids[stop - 1], tokenizer.eos_id} & tokenizer.special_ids & set(ids[start : stop - 1]):
                raise UserError(
                    "a learned text holds an end token, behind which nothing is generated: "
                    f"{tokenizer.decode(ids[start:stop])[-80:]!r}; remove it, the template prints its own"
                )
    if ids[stop - 1] in tokenizer.special_ids:
        return list(ids[:stop]), mask[:stop]
    rest = tokenizer.decode(ids[stop:])
    if rest.strip():
        raise UserError(
            f"the chat template prints {rest!r} behind the last assistant turn, outside of its generation "
            "block, so that no end would be learned; close the block behind that text"
        )
    return [*ids[:stop], tokenizer.eos_id], [*mask[:stop], True]


def _encode_prefix(tokenizer: Tokenizer, text: str, cut: int, whole: list[int]) -> list[int]:
    """Tokens of text[:cut]."""
    if cut == len(text):
        return whole
    return tokenizer.encode(text[:cut]) if cut else []


def _end_of_turn(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int, ends: set[int]) -> int:
    """Where the learned tokens of the turn that occupies [start, end) stop."""
    last_special = next((i for i in range(end - 1, start - 1, -1) if ids[i] in tokenizer.special_ids), None)
    if last_special is not None and not tokenizer.decode(ids[last_special + 1 : end]).strip():
        # Some templates end a whole conversation behind its last turn's end and a line break.
        for place in range(last_special - 1, start, -1):
            if ids[place] in tokenizer.special_ids:
                return (last_special if place == last_special - 1 else place) + 1
            if tokenizer.decode([ids[place]]).strip():
                break
        return last_special + 1
    behind = end
    while behind < len(ids) and ids[behind] not in tokenizer.special_ids:
        if tokenizer.decode([ids[behind]]).strip():
            return end
        behind += 1
    return behind + 1 if behind < len(ids) and ids[behind] in ends else end


# Proof that a chat template prints what a row says: every text, every key, and what is learned as written.
# Templates leave out in silence what they do not know: tools, names, a system turn, the thinking of an
# assistant. A key was used when the rendered text is another one without it.

_MARK = "\ufdd2"
"""A Unicode noncharacter: never part of a text."""


def check_nothing_lost(
    template: ChatTemplate, conversation: Conversation, text: str, spans: Mapping[int, tuple[int, int]]
) -> None:
    """Compare the rendered text with the row, which without learned turns is a prompt.

    White space around a text may be trimmed. An earlier assistant turn that is not learned may be printed
    without its thinking, as when the model is served. `spans` has [start, end) of each learned turn in the
    text, by its index.

    Raises:
        UserError: names what is lost or changed.
    """
    check = _Check(template, conversation, text)
    end = 0
    for index, message in enumerate(conversation.messages):
        content = text_of(message).strip()
        if index in spans:
            start, end = spans[index]
            check.is_written(index, _behind_opener(content, text[:start]), text[start:end])
        elif content:
            found = text.find(content, end)
            if found >= 0:
                end = found + len(content)
            else:
                check.is_printed_elsewhere(index, content)
        for key, value in message.items():
            if key not in ("role", "content") and not is_empty(value):
                check.key_is_used(index, key, text[slice(*spans[index])] if index in spans else None)
        check.arguments_are_written(index)
    for key in conversation.given:
        check.given_is_used(key)
    for key in sorted(conversation.columns & template.variables):
        raise UserError(
            f"{key}: {template.origin} reads a variable of this name, which it is not given; rename or "
            "remove the column, or write the value into a template file that tokenizer.chat_template names"
        )


def _behind_opener(content: str, asked: str) -> str:
    """What is to be written of a text behind what is asked, which may end with the text's own `<think>`."""
    return content.removeprefix("<think>").lstrip() if asked.rstrip().endswith("<think>") else content


class _Check:
    """One rendered conversation, and what it would be with something changed."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, text: str) -> None:
        self._template, self._conversation, self._text = template, conversation, text
        self._is_prompt = not conversation.learned

    def is_written(self, index: int, content: str, learned: str) -> None:
        """A learned text stands in its span as the row has it."""
        if content not in learned:
            raise UserError(
                f"{self._name(index)}: {self._template.origin} prints another text than the row has, and "
                f"that would be learned: expected {_short(content)}, got {_short(learned)}; use a template "
                "that prints the assistant's text unchanged (a file that tokenizer.chat_template names)"
            )

    def is_printed_elsewhere(self, index: int, content: str) -> None:
        """A text that is not where it was looked for stands before other turns, or in another form."""
        messages = list(self._conversation.messages)
        role = messages[index]["role"]
        # The result of a tool is often printed as JSON, an earlier answer without its thinking.
        may_change = role not in ("system", "developer", "user")
        messages[index] = {**messages[index], "content": f"{content}{_MARK}"}
        if (may_change or content in self._text) and self._differs(messages):
            return
        raise UserError(
            f"{self._name(index)}: {self._template.origin} does not print the text of this {role} turn, so "
            f"that it would be lost: {_short(content)}; remove it, or use a template that prints it (a "
            "file that tokenizer.chat_template names)"
        )

    def key_is_used(self, index: int, key: str, learned: str | None) -> None:
        """The text is another one without the key, or with another text behind it."""
        messages = list(self._conversation.messages)
        value = messages[index][key]
        changed = {key: f"{value}{_MARK}"} if isinstance(value, str) else {}
        messages[index] = {k: v for k, v in messages[index].items() if k != key} | changed
        is_used = self._differs(messages)
        if learned is None and not is_used:
            # Served, an earlier answer loses its thinking only behind the next question.
            is_used = self._differs(messages, upto=index + 1) or _is_link(self._conversation, index, key)
        if learned is not None and key in THOUGHTS and str(value).strip() not in learned:
            is_used = False
        if not is_used:
            raise UserError(_not_printed(self._template, self._name(index), key))

    def arguments_are_written(self, index: int) -> None:
        """Arguments of calls that are JSON text are printed as they are, and not as a text in quotes."""
        message = self._conversation.messages[index]
        functions = list(functions_of(message))
        for number, function in enumerate(functions):
            if len(functions) > 1 and not self._prints_call(index, number):
                raise UserError(
                    f"{self._name(index)}.tool_calls[{number}]: {self._template.origin} does not print this "
                    "call, so that it would be lost; write one call into each turn, or use a template that "
                    "prints them all (a file that tokenizer.chat_template names)"
                )
            if changes_arguments(function, self._text):
                raise UserError(
                    f"{self._name(index)}.tool_calls[{number}]: {self._template.origin} prints the "
                    "arguments in quotes, or as Python writes them, as no model is asked to; use a template "
                    "that prints JSON (a file that tokenizer.chat_template names)"
                )

    def _prints_call(self, index: int, number: int) -> bool:
        messages = list(self._conversation.messages)
        calls = list(messages[index]["tool_calls"])  # type: ignore[call-overload]
        messages[index] = {**messages[index], "tool_calls": calls[:number] + calls[number + 1 :]}
        return self._differs(messages)

    def given_is_used(self, key: str) -> None:
        """The text is another one without the column."""
        given = {name: value for name, value in self._conversation.given.items() if name != key}
        if not self._differs(self._conversation.messages, given=given):
            raise UserError(
                f"{key}: {self._template.origin} does not print them, so that they would be lost; remove the "
                "column, or use a template that prints them (a file that tokenizer.chat_template names)"
            )

    def _differs(
        self,
        messages: Sequence[Message],
        *,
        upto: int | None = None,
        given: Mapping[str, object] | None = None,
    ) -> bool:
        """Whether other messages (the first `upto` of them) or columns give another text."""
        original = self._conversation
        given = original.variables if given is None else {**original.switches, **given}
        text = self._text
        if upto is not None:
            text = self._template.render(original.messages[:upto], given=original.variables)
        try:
            return text != self._template.render(
                messages[:upto], add_generation_prompt=self._is_prompt and upto is None, given=given
            )
        except UserError:
            return True

    def _name(self, index: int) -> str:
        return self._conversation.names[index]


def _is_link(conversation: Conversation, index: int, key: str) -> bool:
    """Whether a key of a tool's turn only repeats which call it answers, in the order of the calls."""
    messages = conversation.messages
    first = index
    while first and messages[first - 1]["role"] == messages[index]["role"] == "tool":
        first -= 1
    calls = messages[first - 1].get("tool_calls") if first else None
    if messages[index]["role"] != "tool" or not isinstance(calls, Sequence) or index - first >= len(calls):
        return False
    call = calls[index - first]
    if not isinstance(call, Mapping):
        return False
    function = call.get("function")
    named = function.get("name") if isinstance(function, Mapping) else call.get("name")
    return messages[index][key] == {"tool_call_id": call.get("id"), "name": named}.get(key)


def _short(text: str) -> str:
    """A text in quotes, its middle left out when it is long."""
    return repr(text) if len(text) <= 120 else f"{text[:60]!r} ... {text[-60:]!r}"


Tokens = tuple[list[int], list[bool]]
"""Ids [n] of a sequence and mask [n] of what is learned, False at position 0, which no position predicts."""


def tokenize_row(tokenizer: Tokenizer, row: Row | Conversation, learning: Learning = ALL_TURNS) -> Tokens:
    """The one sequence of a row, as of every row with a single learned turn.

    Raises:
        UserError: as tokenize_sequences, or the row has several.
    """
    first, *others = tokenize_sequences(tokenizer, row, learning)
    if others:
        raise UserError(
            f"expected one sequence, got {1 + len(others)}: the learned turns have no common context"
        )
    return first


def tokenize_sequences(
    tokenizer: Tokenizer, row: Row | Conversation, learning: Learning = ALL_TURNS
) -> list[Tokens]:
    """The sequences of a row of demonstrations: one, or several whose learned turns have no common context.

    With a chat template, texts {prompt, response} are one user turn and one assistant turn. Without one, it
    is [first token] + prompt + response + end token.

    Raises:
        UserError: no or an empty response, a wrong type, something that would be lost, or messages that the
            template cannot render or whose assistant turns cannot be told apart from the rest exactly.
    """
    conversation = row if isinstance(row, Conversation) else read_demonstration(row)
    template = tokenizer.chat_template
    if template is None:
        sequences = [_tokenize_plain(tokenizer, *_plain_texts(conversation))]
    else:
        conversation = as_template_reads(template, conversation)
        if learning.turns == "last_turn":
            conversation = conversation.learning_last()
        texts = turn_texts(template, conversation, learning.thinking)
        sequences = [tokens for text in texts for tokens in _tokenize_text(tokenizer, template, text)]
    for _, mask in sequences:
        mask[0] = False
        if not any(mask):
            raise UserError(
                "no token of the row is learned: the chat template prints nothing for its assistant turns"
            )
    return sequences


def _tokenize_text(tokenizer: Tokenizer, template: ChatTemplate, found: TurnText) -> list[Tokens]:
    if found.prompt is None:
        check_nothing_lost(template, found.conversation, found.text, found.spans)
    else:
        _check_written_out(template, found, found.prompt)
    if template.has_generation_markers:
        _check_ends(tokenizer, template, found.conversation, found.text, found.spans)
    text, spans = found.text, list(found.spans.values())
    whole = tokenizer.encode(text)
    tokens = _as_a_whole(tokenizer, text, spans, whole)
    if template.has_generation_markers:
        return [learn_ends(tokenizer, *(tokens or _apart(tokenizer, text, spans, whole)))]
    if tokens is not None:
        ids, mask = learn_ends(tokenizer, *tokens)
        if len(spans) == 1 or all(ids[stop - 1] in tokenizer.special_ids for stop in _stops(mask)):
            return [(ids, mask)]
    # Asked again, the model is given the whole conversation, in which tokens merge across the start of an
    # earlier answer, or the next header stands for its end: each answer gets a sequence of its own, behind
    # the tokens that it is asked with, and with an end.
    parts = [(text[:end], (start, end)) for start, end in spans]
    return [learn_ends(tokenizer, *tokenize_spans(tokenizer, part, [span])) for part, span in parts]


def _stops(mask: Sequence[bool]) -> list[int]:
    """Behind each run of learned tokens."""
    return [i for i in range(1, len(mask) + 1) if mask[i - 1] and (i == len(mask) or not mask[i])]


def _check_written_out(template: ChatTemplate, found: TurnText, prompt: str) -> None:
    """Nothing is lost of a prompt, nor of the turn behind it: a text, with thoughts where it opens one."""
    conversation, last = found.conversation, len(found.conversation.messages) - 1
    _check_prompt(template, conversation.upto(last - 1, learned=()), prompt)
    learned = found.text[slice(*found.spans[last])]
    check = _Check(template, conversation, learned)
    message = conversation.messages[last]
    check.is_written(last, _behind_opener(text_of(message).strip(), prompt), learned)
    whole = template.render(conversation.messages, given=conversation.variables)
    _Check(template, conversation, whole).arguments_are_written(last)
    has_opener = prompt.rstrip().endswith("<think>")
    known = {"role", "content", "tool_calls", *(THOUGHTS if has_opener else ())}
    for key in sorted(message.keys() - known):
        if not is_empty(message[key]):
            raise UserError(_not_printed(template, conversation.names[last], key))


def _check_prompt(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Nothing is lost of a prompt but thoughts that the template prints of no turn, as when it is served."""
    answers = [{k: v for k, v in m.items() if k not in THOUGHTS} for m in conversation.messages]
    bare = replace(conversation, messages=tuple(answers))
    is_served_so = asked_text(template, bare, len(answers)) == text
    check_nothing_lost(template, bare if is_served_so else conversation, text, {})


def _not_printed(template: ChatTemplate, name: str, key: str) -> str:
    return (
        f"{name}.{key}: {template.origin} does not print it, so that it would be lost; remove the key, or "
        "use a template that prints it (a file that tokenizer.chat_template names)"
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Message] | Conversation) -> list[int]:
    """Ids [P] in front of a response, the same for generation as stand there in a sequence for training.

    Raises:
        UserError: messages without a chat template or that it cannot render, or something that would be lost.
    """
    conversation = prompt
    if not isinstance(conversation, Conversation):
        conversation = read_prompt({"prompt" if isinstance(prompt, str) else "messages": prompt})
    template = tokenizer.chat_template
    if template is None:
        (plain,) = _plain_texts(conversation)
        return _opening(tokenizer) + tokenizer.encode(plain)
    conversation = as_template_reads(template, conversation)
    text = template.render(conversation.messages, add_generation_prompt=True, given=conversation.variables)
    _check_prompt(template, conversation, text)
    return tokenizer.encode(text)


def _check_ends(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversation: Conversation,
    text: str,
    spans: Mapping[int, Span],
) -> None:
    """Raise UserError unless only an end token and white space stand between a block's end and its turn's."""
    for turn, (_, end) in spans.items():
        upto = template.render(conversation.messages[: turn + 1], given=conversation.variables)
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
        return [text_of(message) for message in conversation.messages]
    switches = ["chat_template_kwargs"] if conversation.switches else []
    asks = [*(name for name in conversation.names if name == "system"), *conversation.given, *switches]
    raise UserError(
        f"the row has {', '.join(asks) or 'turns'} but the tokenizer has no chat template; set "
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
