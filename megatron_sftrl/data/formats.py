"""Formats of rows: which columns hold prompt, response and answer, told by the first row of a file.

A format is recognised by the columns that it must have and by their types, and one line says which one it is.
A row that two formats fit is refused, as is a row of another format than those before it: a guess would be
seen only in what a model learns. `data.columns` names the columns of everything else.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from megatron_sftrl.config.data import DemonstrationColumns, PromptColumns
from megatron_sftrl.data.benchmarks import BENCHMARKS, Benchmark
from megatron_sftrl.data.columnar import check_text_columns
from megatron_sftrl.data.conversation import Conversation, Row, read_demonstration, read_prompt
from megatron_sftrl.data.rows import OnRefused, read_file
from megatron_sftrl.data.sources import SourceFile, SourceRow, find_files
from megatron_sftrl.errors import UserError

LOGGER = logging.getLogger(__name__)

Kind = Literal["demonstrations", "prompts"]
"""Rows whose responses are learned, or rows that ask for responses."""

Columns = DemonstrationColumns | PromptColumns

_SAID_BY = ("prompt", "response", "messages")
"""Names under which conversation.py reads what a row says."""

_RESPONSES = ("response", "completion", "target")
"""Columns in which a row of prompts may have a demonstration."""


def _leave_as_is(said: dict[str, object], row: Row) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """One way to write rows.

    Args:
        title: what the log calls it, and what becomes of its columns.
        columns: the column (or a.b inside of one) of each of prompt, response, messages and answer.
        fits: a row has these columns, in the types that tell this format from others.
        finish: changes what was found in the columns where it is not read as it stands.
        used: further columns that `finish` reads.
        is_mapped: the columns are the user's, from data.columns.
        benchmark: what reads the row, in place of `columns`.
    """

    title: str
    columns: Mapping[str, str]
    fits: Callable[[Row], bool]
    finish: Callable[[dict[str, object], Row], None] = _leave_as_is
    used: tuple[str, ...] = ()
    is_mapped: bool = False
    benchmark: Benchmark | None = None

    def __reduce__(self) -> tuple[Callable[..., RowFormat], tuple[object, ...]]:
        """Another process finds the same format there; its functions have no names to send."""
        return (_mapped_format, (dict(self.columns),)) if self.is_mapped else (_format_of, (self.title,))

    def said_by(self, row: Row, kind: Kind, columns: Columns | None = None) -> dict[str, object]:
        """The row under the names that conversation.py reads, with the columns that are the user's own.

        Raises:
            UserError: a column that data.columns names is not there, or a column of another format is.
        """
        said = {name: self._value(row, name) for name in self.columns}
        if self.benchmark is not None:
            asked = columns.instruction if isinstance(columns, PromptColumns) else None
            instruction = self.benchmark.instruction if asked is None else asked
            said["prompt"] = self.benchmark.read(row).prompt(instruction)
        self.finish(said, row)
        others = {key: value for key, value in row.items() if key not in (*self.columns.values(), *self.used)}
        if kind == "demonstrations" and not self.is_mapped:
            left = sorted(key for key in _SAID_BY if others.get(key) is not None)
            if left:
                raise UserError(
                    f"the row has {' and '.join(left)} beside {self.title}; keep one of the two forms, or "
                    f"name the columns that are meant by data.columns{self.example}"
                )
        return {key: value for key, value in others.items() if key not in _SAID_BY} | said

    def answer_column(self, columns: Columns | None) -> str | None:
        """Where the answer of a prompt stands, by data.columns or else the format; None: nowhere known."""
        named = columns.answer if isinstance(columns, PromptColumns) else None
        return named or self.columns.get("answer")

    @property
    def example(self) -> str:
        """`, such as data.columns: {...}`: how to choose this format, empty where no mapping can."""
        if self.benchmark is not None:
            return f", such as data.columns: {{benchmark: {self.benchmark.name}}}"
        if self.used:
            return ""
        return f", such as data.columns: {{{', '.join(f'{n}: {c}' for n, c in self.columns.items())}}}"

    def _value(self, row: Row, name: str) -> object:
        column = self.columns[name]
        is_there, value = find_column(row, column)
        if not is_there:
            raise UserError(f"data.columns.{name}: {_not_there(row, column)}")
        if value is None and name != "answer":
            raise UserError(f"{column} is null in this row; write a text or turns there, or remove the row")
        return value


def find_column(row: Row, column: str) -> tuple[bool, object]:
    """Whether a row has a column, or a key in its objects (`reward_model.ground_truth`), and its value.

    Raises:
        UserError: a column has this name with its dots, and objects have such keys, too.
    """
    inner: object = row
    for part in column.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return (column in row), row.get(column)
        inner = inner[part]
    if "." in column and column in row:
        raise UserError(f"{column}: the row has a column of this name and also such keys; rename one of them")
    return True, inner


def _not_there(row: Row, column: str) -> str:
    """Why a column cannot be read: the nearest one, and a text on the way, which is not parsed."""
    names = list(_dotted(row))
    outer = column
    while "." in outer:
        outer = outer.rpartition(".")[0]
        is_there, value = find_column(row, outer)
        if is_there and not isinstance(value, Mapping):
            return (
                f"expected {column}, but {outer} holds {type(value).__name__} and not an object (JSON text "
                "is not parsed); write it as an object, or name another column"
            )
    near = difflib.get_close_matches(column, names, n=1, cutoff=0)
    nearest = f"; the nearest is {near[0]}" if near else ""
    return f"the row has no column {column}{nearest} (it has {', '.join(map(str, row)) or 'none'})"


def _dotted(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


# What tells the formats apart. A null is no column: columnar files fill in what other rows have.


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


def _is_turns(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(turn, Mapping) for turn in value)
    )


def _is_verl(row: Row) -> bool:
    scoring = row.get("reward_model")
    return _is_turns(row.get("prompt")) and isinstance(scoring, Mapping) and "ground_truth" in scoring


def _is_from_and_value(turns: object) -> bool:
    return _is_turns(turns) and all("from" in turn and "value" in turn for turn in turns)  # type: ignore[union-attr]


def _join_instruction(said: dict[str, object], row: Row) -> None:
    """Alpaca: what the instruction is about stands below it, where there is anything."""
    for name, value in (("instruction", said["prompt"]), ("output", said["response"])):
        if not isinstance(value, str):
            raise UserError(f"{name}: expected text, got {type(value).__name__}")
    about = row.get("input")
    if about is not None and not isinstance(about, str):
        raise UserError(f"input: expected text, got {type(about).__name__}")
    if about:
        said["prompt"] = f"{said['prompt']}\n{about}"


_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant"),
    "system": "system",
}


def _turns_of_sharegpt(name: str, said: dict[str, object], row: Row) -> None:
    """Turns of {from, value} as turns of {role, content}; turns of other keys stay as they are."""
    if not _is_from_and_value(turns := said.get("messages")):
        return
    said["messages"] = [
        _turn_of_sharegpt(turn, f"{name}[{number}]")
        for number, turn in enumerate(turns)  # type: ignore[arg-type]
    ]


def _turn_of_sharegpt(turn: Mapping[str, object], name: str) -> dict[str, object]:
    speaker, text = turn["from"], turn["value"]
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(
            f"{name}.from: expected one of {', '.join(_SHAREGPT_ROLES)}, got {speaker!r}; write the row with "
            "messages of role and content"
        )
    if not isinstance(text, str):
        raise UserError(f"{name}.value: expected text, got {type(text).__name__}")
    for key in ("role", "content"):
        if turn.get(key) is not None:
            raise UserError(f"{name} has from and value, and also {key}; keep one of the two forms")
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": role, "content": text, **others}


def _known(title: str, fits: Callable[[Row], bool], **columns: str) -> RowFormat:
    return RowFormat(title=title, columns=MappingProxyType(columns), fits=fits)


_MESSAGES = _known("messages", _has("messages"), messages="messages")

_BENCHMARKS = {
    name: RowFormat(
        title=f"{name} rows: question, options and instruction as the prompt",
        columns=MappingProxyType({}),
        fits=benchmark.fits,
        used=tuple(column for each in benchmark.columns for column in each.split("|")),
        benchmark=benchmark,
    )
    for name, benchmark in BENCHMARKS.items()
}

_FORMATS: dict[Kind, tuple[RowFormat, ...]] = {
    "demonstrations": (
        _MESSAGES,
        _known("prompt and response", _has("prompt", "response"), prompt="prompt", response="response"),
        _known(
            "TRL's rows: prompt, and completion as the response",
            _has("prompt", "completion"),
            prompt="prompt",
            response="completion",
        ),
        _known(
            "LUFFY's rows: prompt turns, and target turns as the response",
            lambda row: _is_turns(row.get("prompt")) and _is_turns(row.get("target")),
            prompt="prompt",
            response="target",
        ),
        RowFormat(
            title="Alpaca's rows: instruction, a newline and input as the prompt, output as the response",
            columns=MappingProxyType({"prompt": "instruction", "response": "output"}),
            fits=_has("instruction", "output"),
            finish=_join_instruction,
            used=("input",),
        ),
        RowFormat(
            title="ShareGPT's rows: conversations of from and value, human as user and gpt as assistant",
            columns=MappingProxyType({"messages": "conversations"}),
            fits=lambda row: _is_from_and_value(row.get("conversations")),
            finish=lambda said, row: _turns_of_sharegpt("conversations", said, row),
        ),
    ),
    "prompts": (
        _known(
            "verl's RL rows: prompt turns",
            _is_verl,
            prompt="prompt",
            answer="reward_model.ground_truth",
        ),
        _known("prompts", lambda row: row.get("prompt") is not None and not _is_verl(row), prompt="prompt"),
        _MESSAGES,
        _known(
            "question and answer: question as the prompt",
            # Options that the prompt would leave out make another question.
            lambda row: _has("question", "answer")(row) and not any(map(row.get, ("options", "choices"))),
            prompt="question",
            answer="answer",
        ),
        *(each for each in _BENCHMARKS.values() if each.benchmark and each.benchmark.known_by is not None),
    ),
}


def _format_of(title: str) -> RowFormat:
    every = (*_FORMATS["demonstrations"], *_FORMATS["prompts"], *_BENCHMARKS.values())
    return next(each for each in every if each.title == title)


_EXPECTED: dict[Kind, str] = {
    "demonstrations": "expected prompt and response (or completion, or target), messages, conversations of "
    "from and value, or instruction and output",
    "prompts": "expected either prompt or messages, or question and answer, or the columns of a benchmark",
}


def recognise(row: Row, kind: Kind, columns: Columns | None = None) -> RowFormat:
    """The one format that a row is written in; `columns` are data.columns.

    Raises:
        UserError: no format fits, or more than one.
    """
    mapped = {} if columns is None else columns.model_dump(exclude_none=True)
    if kind == "prompts":
        mapped.pop("response", None)  # stands beside the prompt, whatever the prompt's format
    if any(name in mapped for name in _SAID_BY):
        return _mapped_format(mapped)
    if "benchmark" in mapped:
        return _named_benchmark(mapped["benchmark"], row)
    fitting = [each for each in _FORMATS[kind] if each.fits(row)]
    if not fitting:
        missing = ""
        if kind == "demonstrations":
            missing = f"the row has no {'prompt' if row.get('prompt') is None else 'response'}; "
        elif meant := [each for each in BENCHMARKS.values() if each.is_meant(row)]:
            lacking = ", or ".join(f"{' and '.join(each.missing(row))} of {each.name}" for each in meant)
            missing = f"the row has no {lacking}; "
        raise UserError(
            f"{missing}{_EXPECTED[kind]}, got {sorted(row)}; data.columns names columns of other names"
        )
    if len(fitting) > 1:
        one, two = fitting[:2]
        raise UserError(
            f"the row fits two formats, {one.title}; and {two.title}: remove the columns of one, or name "
            f"those that are meant by data.columns{one.example or two.example}"
        )
    if "instruction" in mapped and fitting[0].benchmark is None:
        raise UserError(
            f"data.columns.instruction is for rows of a benchmark, and the row holds {fitting[0].title}; "
            "remove it, or name the benchmark by data.columns.benchmark"
        )
    return fitting[0]


def _named_benchmark(name: str, row: Row) -> RowFormat:
    if missing := BENCHMARKS[name].missing(row):
        raise UserError(
            f"data.columns.benchmark: a row of {name} has {' and '.join(missing)}, got {sorted(row)}"
        )
    return _BENCHMARKS[name]


def _mapped_format(mapped: Mapping[str, str]) -> RowFormat:
    told = ", ".join(f"{name} from {column}" for name, column in mapped.items() if name != "answer")
    name = mapped.get("messages", "")
    return RowFormat(
        title=f"rows as data.columns names them: {told}",
        columns=MappingProxyType(dict(mapped)),
        fits=lambda row: True,
        finish=lambda said, row: _turns_of_sharegpt(name, said, row),
        is_mapped=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FormattedRow:
    """A row as its file holds it, its number as in SourceRow, and the format of its file."""

    values: Mapping[str, object]
    file: SourceFile
    number: int
    kind: Kind
    format: RowFormat
    columns: Columns | None

    @property
    def source(self) -> str:
        """Where the row stands, such as `train.jsonl:17`."""
        return f"{self.file.place}{self.number}"

    def conversation(self) -> Conversation:
        """What the row says.

        Raises:
            UserError: without the row's place: another format than the file's, or a row that cannot be used.
        """
        found = self.format
        if not found.is_mapped and (
            (found := recognise(self.values, self.kind, self.columns)) is not self.format
        ):
            raise UserError(
                f"the row holds {found.title}, but the first row of the file holds {self.format.title}; "
                "write rows of one format into each file"
            )
        said = found.said_by(self.values, self.kind, self.columns)
        read = read_demonstration if self.kind == "demonstrations" else read_prompt
        return read(said, found.columns)

    def demonstration(self) -> Conversation | None:
        """The prompt with the row's own response, one assistant turn, behind it; None where it has none.

        Raises:
            UserError: without the row's place: the column of data.columns is not there, there are several,
                or a response that cannot be used.
        """
        assert self.kind == "prompts"
        column = self._response_column()
        response = None if column is None else find_column(self.values, column)[1]
        if response is None:
            return None
        said = self.format.said_by(self.values, "prompts")
        asked = said.pop("messages", None) if said.get("prompt") is None else said["prompt"]
        names = {**self.format.columns, "response": column}
        names["prompt"] = names.get("prompt", names.get("messages", "prompt"))
        found = read_demonstration({**said, "prompt": asked, "response": response}, names)
        if len(found.messages) - len(self.conversation().messages) != 1:
            raise UserError(
                f"{column}: a demonstration in a group is one assistant turn, as a generated response is; "
                "write the turns in front of its last one into the prompt"
            )
        return found

    def _response_column(self) -> str | None:
        """Where a row of prompts has its demonstration."""
        named = self.columns.response if isinstance(self.columns, PromptColumns) else None
        if named is not None:
            if not find_column(self.values, named)[0]:
                raise UserError(f"data.columns.response: {_not_there(self.values, named)}")
            return named
        there = [name for name in _RESPONSES if self.values.get(name) is not None]
        if len(there) > 1:
            raise UserError(
                f"the row has {' and '.join(there)}; name the demonstration that is meant by data.columns, "
                f"such as data.columns: {{response: {there[0]}}}"
            )
        return there[0] if there else None

    def values_with_answer(self) -> Mapping[str, object]:
        """The row for the rewards: every column, and `answer` from where the format has it.

        Of a benchmark with options, `options` are their texts in the order of the letters, and the answer is
        one of the letters.

        Raises:
            UserError: without the row's place: the answer's column is not there, or there are two answers.
        """
        if self.format.benchmark is not None:
            question = self.format.benchmark.read(self.values)
            options = {"options": list(question.options)} if question.options else {}
            return {**self.values, "answer": question.answer, **options}
        column = self.format.answer_column(self.columns)
        if column is None or column == "answer":
            return self.values
        is_there, answer = find_column(self.values, column)
        if not is_there:
            raise UserError(f"data.columns.answer: {_not_there(self.values, column)}")
        own = self.values.get("answer")
        is_named = isinstance(self.columns, PromptColumns) and self.columns.answer is not None
        if not is_named and own is not None and own != answer:
            raise UserError(
                f"the row has two answers, {own!r} in answer and {answer!r} in {column}; remove one, or name "
                f"the one that is meant by data.columns, such as data.columns: {{answer: {column}}}"
            )
        return {**self.values, "answer": answer}


def read_formatted(
    path: Path,
    kind: Kind,
    *,
    columns: Columns | None = None,
    key: str,
    files: Sequence[SourceFile] | None = None,
    on_refused: OnRefused | None = None,
) -> Iterator[FormattedRow]:
    """Rows of a path in order, each file in the format of its first row, which one line of the log tells.

    `columns` are data.columns, `key` is where the path stands in the configuration, `files` are those of
    find_files where they are known already. With `on_refused`, which is given rows that cannot be read, the
    format of a file is that of its first row that has one.

    Raises:
        UserError: as find_files and read_file, or the first row of a file is of no format or of two.
    """
    told = ""
    for file in find_files(path, key) if files is None else files:
        chosen = None
        for row in read_file(file, on_refused=on_refused):
            if chosen is None:
                chosen = _format_of_row(row, kind, columns, on_refused)
                if chosen is None:
                    continue
                _check_texts(file, chosen, kind, columns)
                if chosen.title != told:
                    _tell_format(key, path, chosen, kind, columns)
                told = chosen.title
            yield FormattedRow(
                values=row.values,
                file=row.file,
                number=row.number,
                kind=kind,
                format=chosen,
                columns=columns,
            )


def _format_of_row(
    row: SourceRow, kind: Kind, columns: Columns | None, on_refused: OnRefused | None
) -> RowFormat | None:
    try:
        return recognise(row.values, kind, columns)
    except UserError as error:
        placed = UserError(f"{row.place}: {error}")
        if on_refused is None:
            raise placed from error
        placed.__cause__ = error
        on_refused(row.number, row.place, placed)
        return None


def _check_texts(file: SourceFile, chosen: RowFormat, kind: Kind, columns: Columns | None) -> None:
    """Raise UserError where a type of the file says that what is read may not be what was written."""
    texts = {name: column for name, column in chosen.columns.items() if name != "messages"}
    if kind == "prompts":
        texts["answer"] = chosen.answer_column(columns) or "answer"
    texts |= {name: name for name in chosen.used}
    if isinstance(columns, PromptColumns) and columns.response is not None:
        texts["response"] = columns.response
    turns = [column for name, column in chosen.columns.items() if name == "messages"]
    check_text_columns(file, list(texts.values()), turns=turns)


def _tell_format(key: str, path: Path, chosen: RowFormat, kind: Kind, columns: Columns | None) -> None:
    answer = chosen.answer_column(columns) if kind == "prompts" else None
    told = f", answer from {answer}" if answer not in (None, "answer") else ""
    LOGGER.info("%s: %s holds %s%s", key, path, chosen.title, told)
