"""Chat templates: Jinja text to rendered conversations, in a sandbox, with the spans that were generated.

The environment is the one Hugging Face templates are written for (trim_blocks, lstrip_blocks, loop
controls, `tojson`, `raise_exception`), with one exception: `strftime_now` gives tokenizer.date, because the
tokens of a row must not depend on the day. Without that date there is none, and templates that ask
`strftime_now is defined` use a date of their own.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
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

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn whose text the model has to write; a template reads one of them, or none."""

# Unicode noncharacters: never part of a text, so they can travel through a rendering as marks.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class ChatTemplate:
    """A compiled template. Rendering has no side effects and reaches no file, module or clock."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        origin: str,
        switches: Mapping[str, object] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        """Compile Jinja text; `origin` says in messages where the text came from.

        `switches` are tokenizer.chat_template_kwargs, `date` is tokenizer.date.

        Raises:
            UserError: the text is not Jinja, or nothing in it reads a switch or the date.
        """
        self.source = source
        self.origin = origin
        self._special_tokens: dict[str, object] = dict(special_tokens)
        self._switches = dict(switches or {})
        if date is not None:
            self._special_tokens["strftime_now"] = date.strftime
        try:
            self._plain = _environment("", "").from_string(source)
            self._marked = _environment(_OPEN, _CLOSE).from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{origin} is not a Jinja template: {error}") from error
        self.has_generation_markers = _has_generation_markers(source)
        self._readable = _variables(source) - {*special_tokens, "messages", "add_generation_prompt"}
        self.variables = self._readable - {*self._switches}
        """What the template reads and finds undefined, unless a row gives it (tools, documents)."""
        self.asks_the_clock = "strftime_now" in source
        self.check_switches(self._switches, "tokenizer.chat_template_kwargs")
        if date is not None and not self.asks_the_clock:
            raise UserError(f"tokenizer.date: {origin} prints no date that it is given; remove the key")

    def check_switches(self, switches: Mapping[str, object], name: str) -> None:
        """Raise UserError where the template reads no variable of a switch's name."""
        for key in switches:
            if key not in self._readable - {"tools", "documents"}:
                readable = ", ".join(sorted(self._readable - {"tools", "documents"})) or "none"
                raise UserError(
                    f"{name}.{key}: {self.origin} reads no variable of this name; it reads {readable}"
                )

    @cached_property
    def thought_key(self) -> str | None:
        """The first of THOUGHTS that the template reads; None when it reads none."""
        return next(
            (key for key in THOUGHTS if re.search(rf"\.{key}\b|['\"]{key}['\"]", self.source)),
            None,
        )

    @cached_property
    def part_joiner(self) -> str:
        """What stands between the texts of a turn whose content is a list of them.

        It is what the template prints there; for one that reads only text, a line break, as vLLM serves it.
        """
        one, two = "\ufdd4", "\ufdd5"
        parts = [{"type": "text", "text": text} for text in (one, two)]
        try:
            listed = self.render([{"role": "user", "content": parts}])
            plain = self.render([{"role": "user", "content": one}])
        except UserError:
            return "\n"
        between = listed.partition(one)[2].partition(two)[0]
        return between if listed.replace(f"{one}{between}{two}", one) == plain else "\n"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process compiles the text again."""
        given = {"special_tokens": self._special_tokens, "switches": self._switches}
        return partial(ChatTemplate, origin=self.origin, **given), (self.source,)

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
                **{"tools": None, "documents": None, **self._switches, **given},
                **self._special_tokens,
            )
        except jinja2.UndefinedError as error:
            if "strftime_now" not in str(error):
                raise UserError(f"{self.origin} cannot render these messages: {error}") from error
            raise UserError(
                f"{self.origin} asks for today's date, and the tokens of a row must not depend on the day; "
                "set tokenizer.date, for example to 2026-01-31"
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
