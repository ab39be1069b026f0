"""Proof that a chat template prints what a row says: every text, every key, and what is learned as written.

Templates leave out what they do not know, in silence: tools, names, a system turn, the thinking of an
assistant. A key was used when the rendered text is another one without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from megatron_sftrl.data.conversation import Conversation, is_empty
from megatron_sftrl.data.template import ChatTemplate, Message
from megatron_sftrl.errors import UserError

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn whose text the model has to write."""

_MARK = "\ufdd2"
"""A Unicode noncharacter: never part of a text."""


def check_nothing_lost(
    template: ChatTemplate, conversation: Conversation, text: str, spans: Mapping[int, tuple[int, int]]
) -> None:
    """Compare the rendered text with the row.

    White space around a text may be trimmed. An earlier assistant turn that is not learned may be printed
    without its thinking, as when the model is served.

    Args:
        template: that rendered the conversation.
        conversation: what the row says; without learned turns it is a prompt.
        text: what was rendered.
        spans: [start, end) of each learned turn in the text, by its index.
    Raises:
        UserError: names what is lost or changed.
    """
    check = _Check(template, conversation, text)
    end = 0
    for index, message in enumerate(conversation.messages):
        content = str(message["content"]).strip()
        if index in spans:
            start, end = spans[index]
            check.is_written(index, content, text[start:end])
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
        if learned is not None and key in _THOUGHTS and str(value).strip() not in learned:
            is_used = False
        if not is_used:
            raise UserError(
                f"{self._name(index)}.{key}: {self._template.origin} does not print it, so that it would be "
                "lost; remove the key, or use a template that prints it (a file that tokenizer.chat_template "
                "names)"
            )

    def arguments_are_written(self, index: int) -> None:
        """Arguments of calls that are JSON text are printed as they are, and not as a text in quotes."""
        calls = self._conversation.messages[index].get("tool_calls")
        for number, call in enumerate(calls if isinstance(calls, Sequence) else ()):
            function = call.get("function", call) if isinstance(call, Mapping) else None
            written = function.get("arguments") if isinstance(function, Mapping) else None
            if not isinstance(written, str):
                continue
            quoted = json.dumps(written, ensure_ascii=False)
            times = self._text.count(quoted)
            if times and self._text.count(written) <= times * quoted.count(written):
                raise UserError(
                    f"{self._name(index)}.tool_calls[{number}]: {self._template.origin} prints the text of "
                    "the arguments in quotes, as no model is asked to write them; write them as an object"
                )

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
        given = original.given if given is None else given
        text = self._text
        if upto is not None:
            text = self._template.render(original.messages[:upto], given=original.given)
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
