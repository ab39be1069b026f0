"""What a row says: its turns, which of them are learned, its system text and its tools.

Every instruction of a row is honoured or refused by name. A column that is none of them is the user's own
(an id, a source, an answer for a reward) and is left alone; a key of a turn is an instruction.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_sftrl.data.template import THOUGHTS, ChatTemplate, Message
from megatron_sftrl.errors import UserError

Row = Mapping[str, object]
"""One row as its file holds it."""

_FLAGS: tuple[str, ...] = ("weight", "loss", "trainable", "train", "training")
"""Names under which the common formats say whether a turn is learned."""

_GIVEN = ("tools", "documents")
"""Columns that a chat template is given beside the turns."""

_OWN_NAMES: Mapping[str, str] = {}

_SWITCHES = "chat_template_kwargs"

_READ = {"prompt", "response", "messages", "system", _SWITCHES, *_GIVEN}

_SYSTEM = "name the column system"
_ONLY_TEXT = "only text is read"
_OF_A_PROMPT = {
    "functions": "write them as tools",
    "toolchoice": "write the choice into a turn, or remove the column",
    "paralleltoolcalls": "remove the column",
    "system": _SYSTEM,
    "systemprompt": _SYSTEM,
    "systemmessage": _SYSTEM,
    "systeminstruction": _SYSTEM,
    "systeminstructions": _SYSTEM,
    "history": "write the earlier turns into messages",
    "chattemplate": "name the file as tokenizer.chat_template",
    "chattemplatekwargs": "name the column chat_template_kwargs",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _ONLY_TEXT),
}
_INTO_THE_TURN = "write it into the response, or into an assistant turn of messages"
_OF_A_RESPONSE = {
    **dict.fromkeys(
        ("reasoning", "reasoningcontent", "thinking", "thinkingcontent", "thought", "thoughts"),
        _INTO_THE_TURN,
    ),
    "toolcalls": "write them into an assistant turn of messages",
    "functioncall": "write it into an assistant turn of messages",
}
"""Columns that say what a model is to be asked or to answer, and that nothing reads; in any spelling of
capitals, _ and -."""

_WEIGHTS: dict[str, bool] = dict.fromkeys(_FLAGS, True)
_OF_ROWS = {*_WEIGHTS, "lossweight", "sampleweight"}
_OF_LEARNING = {
    **_WEIGHTS,
    **dict.fromkeys(
        ("lossweight", "sampleweight", "weights", "lossmask", "mask", "assistantmask", "assistantmasks"), True
    ),
    **dict.fromkeys(("maskhistory", "trainonprompt", "trainoninput", "trainoninputs"), False),
}
"""Columns that say what of a row is learned, and what they may say: what is done without them."""

_OTHER_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
"""Names of roles in other formats. A template that prints any name would make context of an answer."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns in order, checked: each has a role and a text.

    Args:
        messages: the turns; keys whose value is null are left out, since columnar files fill them in.
        names: where each of them stands in the row, such as `response` or `messages[3]`.
        learned: indices of the assistant turns that are learned; none in a prompt.
        asked: those of them whose own keys say so.
        given: tools and documents of the row, where it has some.
        switches: its chat_template_kwargs.
        columns: names of its other columns that hold something.
        is_plain: the row is two texts or one, prompt and response, with nothing that needs a chat template.
    """

    messages: tuple[Message, ...]
    names: tuple[str, ...]
    learned: tuple[int, ...]
    asked: tuple[int, ...]
    given: Mapping[str, object]
    switches: Mapping[str, object]
    columns: frozenset[str]
    is_plain: bool

    @property
    def variables(self) -> dict[str, object]:
        """What a template is given of the row beside its turns."""
        return {**self.switches, **self.given}

    def upto(self, turn: int, *, learned: tuple[int, ...]) -> Conversation:
        """The conversation that ends with a turn, with these of its turns learned."""
        end = turn + 1
        return replace(self, messages=self.messages[:end], names=self.names[:end], learned=learned)

    def learning_last(self) -> Conversation:
        """The conversation with the last of its learned turns as the only one."""
        return replace(self, learned=self.learned[-1:], asked=())


Names = Mapping[str, str]
"""What the columns that are read here are called in the file, for messages: {response: completion}, say."""


def is_left_out(row: Row) -> bool:
    """Whether a row of demonstrations says that none of it is learned: `weight: 0`, or `train: false`."""
    return any(_plain(key) in _OF_ROWS and _flags(value) == [False] for key, value in row.items())


def read_demonstration(row: Row, names: Names = _OWN_NAMES) -> Conversation:
    """The conversation of a row of demonstrations, up to its last learned turn.

    The row has `prompt` and `response`, each a text or a list of turns, or `messages`; `system`, `tools` and
    `documents` beside them. Assistant turns of messages and response are learned, except those with
    `weight: 0` (or `loss`, `trainable`, `train` or `training: false`).

    Raises:
        UserError: no or an empty response, a wrong type, no turn to learn, an instruction that nothing reads.
    """
    _refuse_columns(row, {**_OF_A_PROMPT, **_OF_A_RESPONSE}, _OF_LEARNING)
    if row.get("messages") is not None:
        if row.get("prompt") is not None or row.get("response") is not None:
            raise UserError(
                "the row has messages and also prompt or response; keep one of the two forms, or name one by "
                "data.columns, such as data.columns: {messages: messages}"
            )
        name = names.get("messages", "messages")
        turns = _turns(row["messages"], name)
        return _demonstration(row, turns, _numbered(turns, name), first=0)
    for key in ("prompt", "response"):
        if row.get(key) is None:
            raise UserError(
                f"the row has no {key}; expected prompt and response, or messages, got {sorted(row)}"
            )
    prompt, of_prompt = _texts_or_turns(row["prompt"], names.get("prompt", "prompt"), "user")
    answer, of_answer = _texts_or_turns(row["response"], names.get("response", "response"), "assistant")
    for turn, name in zip(prompt, of_prompt, strict=True):
        if _flag(turn, name):
            raise UserError(f"{name} says that it is learned, but turns of a prompt are not; remove the key")
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{of_prompt[-1]}: the prompt ends with an assistant turn; move it into the response")
    if answer[0]["role"] != "assistant":
        raise UserError(f"{of_answer[0]}.role: expected assistant, got {answer[0]['role']!r}")
    if isinstance(row["response"], str) and not row["response"].strip():
        raise UserError("the response is empty; remove the row")
    is_text = isinstance(row["prompt"], str) and isinstance(row["response"], str)
    names_of_turns = [*of_prompt, *of_answer]
    return _demonstration(row, [*prompt, *answer], names_of_turns, first=len(prompt), is_text=is_text)


def _demonstration(
    row: Row, turns: list[Message], names: list[str], *, first: int, is_text: bool = False
) -> Conversation:
    """The conversation whose assistant turns from number `first` on are learned, where they do not say no."""
    flags = [_flag(turn, name) for turn, name in zip(turns, names, strict=True)]
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number >= first]
    if not answers:
        raise UserError("the row has no response: none of its messages has the role assistant")
    learned = [number for number in answers if flags[number] is not False]
    if not learned:
        raise UserError("the row teaches nothing: none of its assistant turns is learned; remove the row")
    for number in learned:
        said = turns[number]["content"]
        if isinstance(said, str) and not said.strip() and not _calls(turns[number]):
            raise UserError(f"{names[number]}: the assistant's response is empty; remove the turn")
    # Turns behind the last learned one teach nothing and would only cost tokens.
    upto = learned[-1] + 1
    asked = [number for number in learned if flags[number]]
    return _conversation(row, turns[:upto], names[:upto], learned, asked, is_text=is_text)


def read_prompt(row: Row, names: Names = _OWN_NAMES) -> Conversation:
    """The prompt that a row asks to be answered; a reference answer beside it is left alone.

    The row has `prompt` (a text or a list of turns) or `messages`, whose last turn is not the assistant's;
    `system`, `tools` and `documents` beside them.

    Raises:
        UserError: neither is there, a wrong type, or an instruction that is not read.
    """
    _refuse_columns(row, _OF_A_PROMPT, _WEIGHTS)
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise UserError(f"expected either prompt or messages, got {sorted(row)}")
    key = "messages" if prompt is None else "prompt"
    name, said = names.get(key, key), row[key]
    if isinstance(said, str) and prompt is not None:
        if not said:
            raise UserError(f"{name}: expected a non-empty text, or a list of turns")
        return _conversation(row, [{"role": "user", "content": said}], [name], is_text=True)
    turns = _turns(said, name)
    if turns[-1]["role"] == "assistant":
        raise UserError(f"{name}: the last turn is the assistant's; remove it, it is what is generated")
    return _conversation(row, turns, _numbered(turns, name))


def _texts_or_turns(said: object, name: str, role: str) -> tuple[list[Message], list[str]]:
    """The turns of a prompt or a response, a text being one turn of the role, and what each is called."""
    if isinstance(said, str):
        return [{"role": role, "content": said}], [name]
    if not isinstance(said, Sequence):
        raise UserError(f"{name}: expected text, or a list of turns, got {type(said).__name__}")
    turns = _turns(said, name)
    return turns, _numbered(turns, name)


def _conversation(
    row: Row,
    turns: Sequence[Message],
    names: Sequence[str],
    learned: Sequence[int] = (),
    asked: Sequence[int] = (),
    *,
    is_text: bool = False,
) -> Conversation:
    """The turns behind the row's system text, and what a template is given beside them."""
    given = {key: value for key in _GIVEN if not is_empty(value := _objects(key, row.get(key)))}
    system = row.get("system")
    is_plain = is_text and not given and is_empty(system) and is_empty(row.get(_SWITCHES))
    if not is_empty(system):
        if not isinstance(system, str):
            raise UserError(f"system: expected text, got {type(system).__name__}")
        if turns[0]["role"] == "system":
            raise UserError("the row has a column system and also a system turn; keep one of the two")
        turns, names = [{"role": "system", "content": system}, *turns], ["system", *names]
        learned, asked = [number + 1 for number in learned], [number + 1 for number in asked]
    return Conversation(
        messages=tuple({key: value for key, value in turn.items() if key not in _FLAGS} for turn in turns),
        names=tuple(names),
        learned=tuple(learned),
        asked=tuple(asked),
        given=given,
        switches=_switches(row.get(_SWITCHES)),
        columns=frozenset(key for key, value in row.items() if not is_empty(value)) - _READ,
        is_plain=is_plain,
    )


def is_empty(value: object) -> bool:
    """Whether a key says nothing: null, or a text, list or object without content."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and len(value) == 0)


def _numbered(turns: Sequence[Message], name: str) -> list[str]:
    return [f"{name}[{number}]" for number in range(len(turns))]


def _objects(key: str, value: object) -> object:
    """A list of objects, or its JSON text, as columnar files hold it: they would fill in keys with null."""
    found = value
    if isinstance(value, str) and value:
        try:
            found = json.loads(value)
        except ValueError as error:
            raise UserError(f"{key}: expected a list of objects, got no JSON: {error}") from error
    if is_empty(found):
        return None
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UserError(f"{key}: expected a list of objects, got {type(found).__name__}")
    for number, each in enumerate(found):
        if not isinstance(each, Mapping):
            raise UserError(f"{key}[{number}]: expected an object, got {type(each).__name__}")
    return found


def _switches(value: object) -> dict[str, object]:
    """An object, or its JSON text; keys whose value is null are left out."""
    found = value
    if isinstance(value, str) and value:
        try:
            found = json.loads(value)
        except ValueError as error:
            raise UserError(f"{_SWITCHES}: expected an object, got no JSON: {error}") from error
    if is_empty(found):
        return {}
    if not isinstance(found, Mapping):
        raise UserError(f"{_SWITCHES}: expected an object, got {type(found).__name__}")
    return {str(key): setting for key, setting in found.items() if setting is not None}


def _plain(key: str) -> str:
    """A column's name in no spelling of capitals, _ and -."""
    return key.casefold().replace("_", "").replace("-", "")


def _refuse_columns(row: Row, columns: Mapping[str, str], flags: Mapping[str, bool]) -> None:
    for key, value in row.items():
        plain = _plain(key)
        if plain in columns and key not in ("system", _SWITCHES) and not is_empty(value):
            raise UserError(f"{key}: nothing reads this column, and it would be lost; {columns[plain]}")
        if plain in flags and any(said is not flags[plain] for said in _flags(value)):
            raise UserError(
                f"{key}: expected {str(flags[plain]).lower()}, got {value!r}: the answers of a row are "
                "learned with the weight 1, or the row is left out (weight: 0); write weight: 0 into the "
                "turns of messages that are not learned"
            )


def _flags(value: object) -> list[object]:
    """What a column says about learning, True for 1; empty for text and objects, which are the user's own."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().casefold(), _number(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [flag for each in value for flag in _flags(each)]
    if not isinstance(value, bool | int | float):
        return []
    return [bool(value) if value in (0, 1) else value]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_calls(turn: Message, name: str) -> None:
    calls = turn.get("tool_calls")
    if is_empty(calls):
        return
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{name}.tool_calls: expected a list of objects, got {type(calls).__name__}")
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise UserError(
                f"{name}.tool_calls[{number}]: expected an object with a function, got {type(call).__name__}"
            )
        if not isinstance(function.get("name"), str):
            raise UserError(f"{name}.tool_calls[{number}]: expected the name of a function, got none")
        if isinstance(written := function.get("arguments"), str) and not _is_json_object(written or "{}"):
            raise UserError(
                f"{name}.tool_calls[{number}].arguments: expected an object, or JSON text of one, got "
                f"{written!r}"
            )


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _calls(turn: Message) -> bool:
    return not (is_empty(turn.get("tool_calls")) and is_empty(turn.get("function_call")))


def _turns(messages: object, name: str) -> list[Message]:
    """Turns with a role and a text."""
    if isinstance(messages, Sequence) and not messages:
        raise UserError(f"{name}: expected a list of turns, got an empty one")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(f"{name}: expected a list of turns, got {type(messages).__name__}")
    checked: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{name}[{number}]: expected role and content, got {type(message).__name__}")
        kept = {str(key): value for key, value in message.items() if value is not None}
        if kept.get("role") == "assistant" and _calls(kept):
            kept.setdefault("content", None)
        elif not isinstance(kept.get("content"), str):
            kept["content"] = _parts(kept.get("content"), f"{name}[{number}].content")
        if not isinstance(kept.get("role"), str):
            raise UserError(f"{name}[{number}].role: expected text, got {type(kept.get('role')).__name__}")
        _check_calls(kept, f"{name}[{number}]")
        role = str(kept["role"])
        known = _OTHER_ROLES.get(role.casefold(), role.casefold())
        if role != known and known in _ROLES:
            raise UserError(f"{name}[{number}].role: expected {known}, got {role!r}; write {known}")
        checked.append(kept)
    return checked


def _parts(content: object, name: str) -> str | list[Message]:
    """The text of a list of parts (OpenAI's form), or the list where there are several of them."""
    if not isinstance(content, Sequence) or not content:
        raise UserError(f"{name}: expected text, got {type(content).__name__}")
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{name}[{number}]: expected a part of type text, got {kind}; {_ONLY_TEXT}")
        if others := sorted(key for key in part if key not in ("type", "text") and part[key] is not None):
            raise UserError(f"{name}[{number}].{others[0]}: nothing reads this key; remove it")
    return str(content[0]["text"]) if len(content) == 1 else list(content)


def text_of(message: Message) -> str:
    """The text of a turn, empty for one of calls alone; a list of parts has become a text before."""
    return str(message["content"] or "")


def _flag(turn: Message, name: str) -> bool | None:
    """Whether a turn says that it is learned; None when it says nothing."""
    said: dict[str, bool] = {}
    for key in _FLAGS:
        if key not in turn:
            continue
        value = turn[key]
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f"{name}.{key}: expected 0 or 1 (or false or true), got {value!r}: a turn is learned as a "
                "whole or not at all"
            )
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise UserError(f"{name}: {' and '.join(said)} contradict each other; keep one of them")
    if not said:
        return None
    if turn["role"] != "assistant" and True in said.values():
        raise UserError(
            f"{name}.{next(iter(said))}: only assistant turns are learned, and this one has the role "
            f"{turn['role']!r}; remove the key"
        )
    return next(iter(said.values()))


# As a template reads it. The forms of OpenAI's messages leave open what a template is given: a list of texts,
# no content beside calls, the arguments of a call as JSON text. Templates differ in which of them they read.


def as_template_reads(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """The conversation in the form that the template prints without loss.

    Raises:
        UserError: arguments that are to be an object and are none; chat_template_kwargs that nothing reads.
    """
    template.check_switches(conversation.switches, "chat_template_kwargs")
    messages = tuple(_with_text(template, message) for message in conversation.messages)
    if any(message.get("tool_calls") for message in messages):
        messages = _with_calls(template, messages, conversation)
    return replace(conversation, messages=messages)


def _with_text(template: ChatTemplate, message: Message) -> Message:
    """The turn with one text, and its thoughts under the key that the template reads."""
    content = message["content"]
    if isinstance(content, list):
        content = template.part_joiner.join(str(part["text"]) for part in content)
    names = {}
    written = [key for key in THOUGHTS if not is_empty(message.get(key))]
    if len(written) == 1 and template.thought_key not in (None, *written):
        names = {written[0]: template.thought_key}
    return {names.get(key, key): value for key, value in message.items()} | {"content": content}


def _with_calls(
    template: ChatTemplate, messages: tuple[Message, ...], conversation: Conversation
) -> tuple[Message, ...]:
    """The turns in the first form in which no call is left out and no arguments are changed.

    No text beside calls is "" or null, and arguments are objects, as vLLM gives them to a template when it
    serves, or as written, or JSON text. Where no form is exact, the first that can be rendered is left to the
    checks of everything else.
    """
    refused: UserError | None = None
    rendered: list[tuple[bool, tuple[Message, ...]]] = []
    for arguments, empty in itertools.product((_as_object, _as_written, _as_text), ("", None)):
        form = tuple(_with_form(message, empty, arguments) for message in messages)
        try:
            text = template.render(
                form, add_generation_prompt=not conversation.learned, given=conversation.variables
            )
        except UserError as error:
            refused = refused or error
            continue
        functions = [function for message in form for function in functions_of(message)]
        is_changed = any(changes_arguments(each, text) for each in functions)
        if not is_changed and all(str(each.get("name")) in text for each in functions):
            return form
        rendered.append((is_changed, form))
    if not rendered:
        assert refused is not None
        raise refused
    return min(rendered, key=lambda each: each[0])[1]


def _with_form(message: Message, empty: str | None, arguments: Callable[[object], object]) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:  # type: ignore[attr-defined]
        function = call.get("function", call)
        if "arguments" in function:
            function = {**function, "arguments": arguments(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


def _as_written(arguments: object) -> object:
    return arguments


def _as_object(arguments: object) -> object:
    """An object of JSON text, which is one by _check_calls; an empty text is one without arguments."""
    return json.loads(arguments or "{}") if isinstance(arguments, str) else arguments


def _as_text(arguments: object) -> object:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def functions_of(message: Message) -> Iterator[Message]:
    """What each call of a turn calls: name and arguments."""
    for call in message.get("tool_calls") or ():  # type: ignore[attr-defined]
        yield call.get("function", call)


def changes_arguments(function: Message, text: str) -> bool:
    """Whether arguments of a call are printed otherwise: JSON text in quotes, an object as Python has it."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        quoted = json.dumps(arguments, ensure_ascii=False)
        times = text.count(quoted)
        return times > 0 and text.count(arguments) <= times * quoted.count(arguments)
    python, written = repr(arguments), json.dumps(arguments, ensure_ascii=False)
    return (python != written and python in text) or any(
        json.dumps(each) in text for each in (python, written)
    )
