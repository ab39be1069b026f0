"""Chat templates: Jinja text to rendered conversations, in a sandbox, with the spans that were generated.

The environment is the one Hugging Face templates are written for (trim_blocks, lstrip_blocks, loop
controls, `tojson`, `raise_exception`), with one exception: there is no `strftime_now`, because the tokens
of a row must not depend on the day. Templates that ask `strftime_now is defined` then use their own date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_sftrl.errors import UserError

Message = Mapping[str, object]
"""One turn: role, content, and whatever else the template reads."""

# Unicode noncharacters: never part of a text, so they can travel through a rendering as marks.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class ChatTemplate:
    """A compiled template. Rendering has no side effects and reaches no file, module or clock."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], origin: str) -> None:
        """Compile Jinja text, else UserError; `origin` says in messages where the text came from."""
        self.source = source
        self.origin = origin
        self._variables = dict(special_tokens)
        try:
            self._plain = _environment("", "").from_string(source)
            self._marked = _environment(_OPEN, _CLOSE).from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{origin} is not a Jinja template: {error}") from error
        self.has_generation_markers = _has_generation_markers(source)
        self.variables = _variables(source) - {*self._variables, "messages", "add_generation_prompt"}
        """What the template reads and finds undefined, unless a row gives it (tools, documents)."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        given: Mapping[str, object] | None = None,
    ) -> str:
        """The conversation as one text, special tokens written out.

        `add_generation_prompt` ends it with the header of an assistant turn; `given` has tools and documents.

        Raises:
            UserError: the template refuses these messages, or needs something it is not given.
        """
        return self._render(self._plain, messages, add_generation_prompt, given or {})

    def render_generated_spans(
        self, messages: Sequence[Message], *, given: Mapping[str, object] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation, and [start, end) of each `{% generation %}` block in it, in order.

        Raises:
            UserError: as in `render`, or the template transforms what a block produced.
        """
        text = self.render(messages, given=given)
        marked = self._render(self._marked, messages, False, given or {})
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        length = start = 0
        for character_run in _split_keeping_marks(marked):
            if character_run == _OPEN:
                start = length
            elif character_run == _CLOSE:
                spans.append((start, length))
            else:
                pieces.append(character_run)
                length += len(character_run)
        if "".join(pieces) != text:
            raise UserError(
                f"{self.origin}: what a {{% generation %}} block produces is changed afterwards, so its "
                "place in the text is not known; write the block where its text is printed"
            )
        return text, spans

    def _render(
        self,
        template: jinja2.Template,
        messages: Sequence[Message],
        generate: bool,
        given: Mapping[str, object],
    ) -> str:
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=generate,
                **{"tools": None, "documents": None, **given},
                **self._variables,
            )
        except jinja2.UndefinedError as error:
            if "strftime_now" not in str(error):
                raise UserError(f"{self.origin} cannot render these messages: {error}") from error
            raise UserError(
                f"{self.origin} asks for today's date (strftime_now), and the tokens of a row must not "
                "depend on the day; copy the template into a file, write a date in place of "
                "strftime_now(...) and name the file as tokenizer.chat_template"
            ) from error
        # Templates are user code: whatever they raise (also TypeError on a missing key) is about them.
        except Exception as error:
            raise UserError(f"{self.origin} cannot render these messages: {error}") from error


def _has_generation_markers(source: str) -> bool:
    """Whether the template contains a generation block (one in a comment or a string does not count)."""
    environment = _environment("", "")
    return any(
        isinstance(call.node, jinja2.nodes.ExtensionAttribute) and call.node.name == "mark"
        for call in environment.parse(source).find_all(jinja2.nodes.Call)
    )


def _variables(source: str) -> frozenset[str]:
    """What a template reads from outside; a name that it sets itself counts where it asks for it first."""
    environment = _environment("", "")
    parsed = environment.parse(source)
    names = list(parsed.find_all(jinja2.nodes.Name))
    asked = {
        test.node.name
        for test in parsed.find_all(jinja2.nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, jinja2.nodes.Name)
    }
    own = {name.name for name in names if name.ctx == "store"} - asked
    return (
        frozenset(jinja2.meta.find_undeclared_variables(parsed))
        - own
        - {*environment.globals, "strftime_now"}
    )


def _environment(open_mark: str, close_mark: str) -> ImmutableSandboxedEnvironment:
    """The sandbox; generation blocks are put between the two marks."""

    class GenerationBlock(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`: text that the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            """Turn the block into a call that receives its rendered body."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: jinja2.runtime.Macro) -> str:
            """The body between its marks."""
            return f"{open_mark}{caller()}{close_mark}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which a conversation must not do."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _split_keeping_marks(text: str) -> list[str]:
    """Runs of ordinary characters and single marks, in order, empty runs left out."""
    return [run for run in re.split(f"([{_OPEN}{_CLOSE}])", text) if run]
