"""Says what is wrong with a configuration in the user's words: which key, from where, what was expected."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from megatron_sftrl.config.data import WeightedPath

_EXPECTED_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Where each key was written: its line in `file`, or by path the `key=value` override that wrote it."""

    file: str
    lines: dict[tuple[str, ...], int]
    overrides: dict[tuple[str, ...], str]
    schema: type[BaseModel]

    def of(self, path: tuple[str, ...]) -> str:
        """The override or the file and line that `path` comes from."""
        ends = range(len(path), 0, -1)
        # An override replaces everything below its key, so it comes before any line of the file.
        by_override = [self.overrides[path[:end]] for end in ends if path[:end] in self.overrides]
        by_override += [text for key, text in self.overrides.items() if key[: len(path)] == path]
        if by_override:
            return f"override '{by_override[0]}'"
        by_line = [self.lines[path[:end]] for end in ends if path[:end] in self.lines]
        return f"{self.file}, line {by_line[0]}" if by_line else self.file


def explain(error: ValidationError, origins: Origins) -> list[str]:
    return [_line(detail, origins) for detail in error.errors(include_url=False)]


def unknown_key(path: tuple[str, ...], schema: type[BaseModel]) -> str | None:
    """What to write instead of a key that the schema does not have; None when it has it."""
    by_path = dict(sections(schema))
    for end in range(1, len(path) + 1):
        if path[: end - 1] in by_path and path[end - 1] not in by_path[path[: end - 1]].model_fields:
            return _nearest(path[:end], schema)
    if path[:-1] in by_path or _is_mapping(path[:-1], by_path):
        return None
    return f"'{'.'.join(path[:-1])}' has no keys of its own"


def _is_mapping(path: tuple[str, ...], by_path: Mapping[tuple[str, ...], type[BaseModel]]) -> bool:
    """Whether the names below this key are the user's, as those of parallel.megatron are."""
    if path[:-1] not in by_path:
        return False
    return typing.get_origin(by_path[path[:-1]].model_fields[path[-1]].annotation) is dict


def sections(
    model: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every section of the schema with its path, outermost first."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = section_type(field.annotation)
        if inner is not None:
            yield from sections(inner, (*path, name))


def section_type(annotation: object) -> type[BaseModel] | None:
    """The section a field holds (`Section` or `Section | None`), or None for a plain value."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for option in typing.get_args(annotation) if is_union else (annotation,):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _line(detail: ErrorDetails, origins: Origins) -> str:
    path = tuple(str(part) for part in detail["loc"])
    dotted, kind, got = ".".join(path), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key '{dotted}' ({origins.of(path)}): {_nearest(path, origins.schema)}"
    if kind == "missing":
        where = origins.of(path[:-1]) if len(path) > 1 else origins.file
        return f"missing key '{dotted}' ({where}): {_meaning(path, origins.schema)}"
    if kind == "value_error":
        text = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return f"{text} ({origins.of(path) if path else origins.file})"
    return f"{dotted} ({origins.of(path)}): expected {_expected(detail)}, got {_shown(got)}"


def _expected(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _EXPECTED_TYPES:
        return _EXPECTED_TYPES[kind]
    if kind == "literal_error":
        return f"one of {context['expected']}".replace("'", "").replace(" or ", ", ")
    bounds = {
        "greater_than_equal": ("ge", ">="),
        "greater_than": ("gt", ">"),
        "less_than_equal": ("le", "<="),
    }
    bounds["less_than"] = ("lt", "<")
    if kind in bounds:
        name, sign = bounds[kind]
        return f"a number {sign} {context[name]:g}"
    if kind == "too_short":
        return f"at least {context['min_length']} item(s)"
    if kind == "too_long":
        return f"at most {context['max_length']} item(s)"
    return detail["msg"][0].lower() + detail["msg"][1:]


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(path: tuple[str, ...], schema: type[BaseModel]) -> str:
    """The key the user most likely meant: in the same section, then anywhere in the tree."""
    by_path = dict(sections(schema))
    siblings = list(by_path[path[:-1]].model_fields)
    close = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{'.'.join((*path[:-1], close[0]))}'?"
    everywhere = {
        ".".join((*section, name)): name for section, model in by_path.items() for name in model.model_fields
    }
    same_name = [dotted for dotted, name in everywhere.items() if name == path[-1]]
    close = same_name or [
        dotted
        for name in difflib.get_close_matches(path[-1], sorted(set(everywhere.values())), n=1, cutoff=0.75)
        for dotted in everywhere
        if everywhere[dotted] == name
    ]
    if close:
        return f"did you mean '{close[0]}'?"
    where = f"'{'.'.join(path[:-1])}'" if len(path) > 1 else "the top level"
    return f"the keys of {where} are {', '.join(siblings)}"


def _meaning(path: tuple[str, ...], schema: type[BaseModel]) -> str:
    """What a missing key stands for, from the schema."""
    model = dict(sections(schema)).get(path[:-1])
    field = model.model_fields.get(path[-1]) if model else None
    if field is None:
        return "it has no default"
    inner = section_type(field.annotation)
    text = (inner.__doc__ if inner else field.description) or ""
    return f"it has no default. {' '.join(text.split())}"


# The reference of every key, generated from the schema so that it cannot fall behind.


def document_schema(schema: type[BaseModel]) -> str:
    """Markdown: one heading per section, one line per key with its type, default and meaning."""
    parts = [
        "# Keys of a run",
        "In the YAML file, or as key=value on the command line (`parallel.tp=2`, "
        "`data.train=[a.jsonl,b.jsonl]`; `key=null` takes a key out). "
        "Paths are relative to the current directory; `~` and $VARIABLES in them are replaced.",
    ]
    for path, model in sections(schema):
        title = f"## {'.'.join(path)}" if path else "## Top level"
        parts.append(f"{title}\n\n{_one_line(model.__doc__)}\n\n{_keys(path, model)}")
    return "\n\n".join(parts) + "\n"


def document_fields(model: type[BaseModel]) -> list[str]:
    """One markdown line for each field of a flat model, such as the options of a loss."""
    return [_reference_line(name, field) for name, field in model.model_fields.items()]


def _reference_line(dotted: str, field: FieldInfo) -> str:
    return f"- `{dotted}` ({_type(field)}; {_default(field)}): {_one_line(field.description)}"


def _keys(path: tuple[str, ...], model: type[BaseModel]) -> str:
    lines = []
    for name, field in model.model_fields.items():
        dotted = ".".join((*path, name))
        if section_type(field.annotation) is None:
            lines.append(_reference_line(dotted, field))
        else:
            note = _one_line(field.description)
            lines.append(f"- `{dotted}` (section; {_default(field)}){': ' + note if note else ''}")
    return "\n".join(lines)


def _type(field: FieldInfo) -> str:
    text = _type_name(field.annotation)
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
    limits = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in field.metadata
        for name, sign in bounds.items()
        if getattr(constraint, name, None) is not None
    ]
    return f"{text} {', '.join(limits)}" if limits else text


def _type_name(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in arguments if option is not type(None))
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    names: dict[object, str] = {
        int: "integer",
        float: "number",
        bool: "true | false",
        str: "text",
        Path: "path",
        WeightedPath: "{path, weight}",
    }
    return names.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "not given by default"
    if isinstance(field.default, BaseModel):
        return "has defaults"
    value = field.default
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, tuple | list):
        value = f"[{', '.join(str(item) for item in value)}]"
    if "\n" in str(value):  # a line of the list is one line
        value = json.dumps(str(value))
    return f"default {value}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
