"""YAML as people expect it: the 1.2 core types, duplicate keys refused, every key's line remembered.

PyYAML follows YAML 1.1, where `wandb: off` is a boolean, `lr: 1e-5` a string and `22:30` the number 1350.
Here true/false are the only booleans and `1e-5` is a number, for reading and for writing alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_sftrl.errors import UserError

_CORE_TYPES: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", "<"),
)


def _core_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_letters in _CORE_TYPES:
        for letter in first_letters:
            table.setdefault("" if letter == "\0" else letter, []).append((tag, re.compile(pattern)))
    return table


def _both_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    core, old = _core_resolvers(), yaml.SafeDumper.yaml_implicit_resolvers
    return {letter: [*old.get(letter, []), *core.get(letter, [])] for letter in {*old, *core}}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _core_resolvers()

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # 0010 is ten; YAML 1.1 reads octal


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something other than text: 'off', '1e-5'."""

    yaml_implicit_resolvers = _both_resolvers()


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlDocument:
    """A parsed document.

    Args:
        value: plain Python: dict, list, str, int, float, bool, None.
        lines: 1-based line of every mapping key, by its path from the root.
    """

    value: Any
    lines: dict[tuple[str, ...], int]


def parse_yaml(text: str, *, source: str) -> YamlDocument:
    """Read one YAML document.

    Args:
        text: the document.
        source: how error messages call it, for example a file name.
    Returns:
        The plain value and the line of each key.
    Raises:
        UserError: text that is not YAML, a key given twice, a key that is not a string, a recursive alias.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[tuple[str, ...], int] = {}
        if node is None:
            return YamlDocument(value=None, lines=lines)
        _walk(node, (), lines, (), source)
        return YamlDocument(value=loader.construct_document(node), lines=lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """Write a plain value so that `parse_yaml` reads the same value back; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _walk(
    node: yaml.Node,
    path: tuple[str, ...],
    lines: dict[tuple[str, ...], int],
    open_nodes: tuple[int, ...],
    source: str,
) -> None:
    """Record the line of each key below `node`, and refuse what a plain tree cannot hold."""
    if id(node) in open_nodes:
        raise UserError(f"{source}, line {node.start_mark.line + 1}: an alias refers to what contains it")
    open_nodes = (*open_nodes, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, str(index)), lines, open_nodes, source)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            _walk(value, path, lines, open_nodes, source)
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{source}, line {line}: a key must be a name, got {key.value!r}; quote it")
        if key.value in seen:
            dotted = ".".join((*path, key.value))
            raise UserError(
                f"{source}, line {line}: '{dotted}' is given twice, first on line {seen[key.value]}; keep one"
            )
        seen[key.value] = line
        lines[(*path, key.value)] = line
        _walk(value, (*path, key.value), lines, open_nodes, source)
