"""The reference of every key, generated from the schema so that it cannot fall behind."""

from __future__ import annotations

import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_sftrl.config.messages import section_type, sections


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
    return [_line(name, field) for name, field in model.model_fields.items()]


def _line(dotted: str, field: FieldInfo) -> str:
    return f"- `{dotted}` ({_type(field)}; {_default(field)}): {_one_line(field.description)}"


def _keys(path: tuple[str, ...], model: type[BaseModel]) -> str:
    lines = []
    for name, field in model.model_fields.items():
        dotted = ".".join((*path, name))
        if section_type(field.annotation) is None:
            lines.append(_line(dotted, field))
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
    names: dict[object, str] = {
        int: "integer",
        float: "number",
        bool: "true | false",
        str: "text",
        Path: "path",
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
    return f"default {value}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
