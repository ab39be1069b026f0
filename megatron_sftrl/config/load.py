"""From a YAML file and `key=value` overrides to a RunConfig, and back to the text of resolved.yaml.

Paths inside the file are relative to the current directory, as on the command line, and may begin with `~` or
contain $VARIABLES; resolved.yaml has them replaced. `key=null` takes a key out again, so that its default
holds; below `loss.` it sets the option to null.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from megatron_sftrl.config.checks import idle_settings
from megatron_sftrl.config.data import Section
from megatron_sftrl.config.messages import Origins, explain, unknown_key
from megatron_sftrl.config.schema import GrpoConfig, RunConfig, TrainingConfig
from megatron_sftrl.errors import UserError, error_of, first_of

# YAML as people expect it: the 1.2 core types, duplicate keys refused, every key's line remembered.
#
# PyYAML follows YAML 1.1, where `wandb: off` is a boolean, `lr: 1e-5` a string and `22:30` the number
# 1350. Here true/false are the only booleans and `1e-5` is a number, for reading and for writing alike.


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
    """A document's plain value, and the 1-based line of every mapping key by its path from the root."""

    value: Any
    lines: dict[tuple[str, ...], int]


def parse_yaml(text: str, *, source: str) -> YamlDocument:
    """Read one YAML document; `source` is how error messages call it, for example a file name.

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


def options_of(words: Sequence[str]) -> dict[str, object]:
    """Options by name, from key=value words with values in YAML; UserError for a word of another form."""
    options: dict[str, object] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not name or not separator:
            raise UserError(f"--option {word!r}: expected key=value, for example --option beta=5.0")
        options[name] = parse_yaml(text, source=f"--option {word!r}").value
    return options


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


# Presets: published settings by name. `preset: dapo` fills in what the run's file leaves open. A preset holds
# only what a paper or its released script states; everything else keeps its own default.


Tree = Mapping[str, Any]
"""A part of a run's file: keys to values, or to further trees."""


class _PresetFiles(Mapping[str, Tree]):
    """NAME.yaml of a folder by NAME, each read when it is asked for, and read-only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Tree:
        if name not in self._names():
            raise KeyError(name)
        file = self._folder / f"{name}.yaml"
        return _frozen(parse_yaml(read_config_text(file), source=str(file)).value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        return sorted(file.stem for file in self._folder.glob("*.yaml"))


def _frozen(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return MappingProxyType({key: _frozen(item) for key, item in value.items()})


PRESETS: Mapping[str, Tree] = _PresetFiles(Path(__file__).with_name("presets"))
"""Presets by name."""


def with_preset(raw: Tree, presets: Mapping[str, Tree]) -> dict[str, Any]:
    """The run's tree with its preset's settings below it, and without the key `preset`; always a new tree.

    A key that the run gives wins over the preset's, whatever its value; a key that it does not give, the
    preset's sections included, comes from the preset. Expanding what comes out again changes nothing.

    Args:
        raw: as parsed, with overrides applied and before validation; not modified.
    Raises:
        UserError: an unknown preset, or one for another loss than the run asks for.
    """
    name = raw.get("preset")
    rest = {key: value for key, value in raw.items() if key != "preset"}
    if name is None:
        return _below({}, rest)
    if not isinstance(name, str) or name not in presets:
        near = difflib.get_close_matches(str(name), list(presets), n=1, cutoff=0.4)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"unknown preset {name!r}{meant}; there are: {', '.join(sorted(presets))}")
    preset = presets[name]
    wanted, offered = _loss_name(raw), _loss_name(preset)
    if wanted is not None and offered is not None and wanted != offered:
        raise UserError(
            f"preset {name!r} sets options of loss {offered!r}, and loss.name is {wanted!r}: remove one of "
            "preset and loss.name"
        )
    return _below(preset, rest)


def _below(defaults: Tree, given: Tree) -> dict[str, Any]:
    """Both trees in one new tree; where both hold a value, the given one."""
    merged: dict[str, Any] = {}
    for key in (*defaults, *(key for key in given if key not in defaults)):
        low, high = defaults.get(key), given.get(key)
        if isinstance(high, Mapping):
            merged[key] = _below(low if isinstance(low, Mapping) else {}, high)
        elif isinstance(low, Mapping) and high is None:
            merged[key] = _below(low, {})  # `loss:` with nothing below it is a section without keys
        else:
            merged[key] = given.get(key, low)
    return merged


def _loss_name(tree: Tree) -> object:
    loss = tree.get("loss")
    return loss.get("name") if isinstance(loss, Mapping) else None


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, schema: type[ConfigT] = RunConfig
) -> ConfigT:
    """Read a run's YAML file, apply overrides in order, and validate the whole.

    Args:
        overrides: `a.b.c=value`, the value in YAML notation (`data.train=[a.jsonl,b.jsonl]`); the last wins.
        schema: RunConfig (`sftrl sft`), GrpoConfig (`sftrl grpo`), or what another command reads.
    Raises:
        UserError: everything that is wrong with the file and the overrides, one line each.
    """
    path = Path(path)
    return config_from_text(read_config_text(path), source=str(path), overrides=overrides, schema=schema)


def config_from_text(
    text: str, *, source: str, overrides: Sequence[str] = (), schema: type[ConfigT] = RunConfig
) -> ConfigT:
    """As `load_config`, for a configuration in a string (a resolved.yaml, say) that messages call `source`.

    Raises:
        UserError: everything that is wrong with it, one line each.
    """
    document = parse_yaml(text, source=source)
    if not isinstance(document.value, dict):
        raise UserError(
            f"{source}: expected sections such as model, data, loss at the top, got {_kind(document.value)}"
        )
    merged, touched = _with_overrides(document.value, overrides, schema)
    if "preset" in schema.model_fields:
        merged = with_preset(merged, PRESETS)
    origins = Origins(file=source, lines=document.lines, overrides=touched, schema=schema)
    return _validated(_with_tokenizer_of_model(merged), origins, schema)


def resolved_yaml(config: TrainingConfig) -> str:
    """Every setting with an effect, defaults included, as YAML; it loads to an equal config and text."""
    tree = config.model_dump(mode="json")
    for setting in idle_settings(config):
        *sections, name = setting.key.split(".")
        del reduce(getitem, sections, tree)[name]
    return dump_yaml(tree)


def read_config_text(path: Path) -> str:
    """The text of a YAML file; UserError when there is no such file, or it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such configuration file: {path} (current directory: {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise error_of(f"cannot read the configuration file {path}: {error}", error) from error


def _with_overrides(
    tree: dict[str, Any], overrides: Sequence[str], schema: type[Section]
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """A copy of `tree` with the overrides applied, and the override that last wrote each path."""
    merged = copy.deepcopy(tree)
    touched: dict[tuple[str, ...], str] = {}
    for override in overrides:
        dotted, separator, text = override.partition("=")
        parts = tuple(dotted.strip().split("."))
        if not separator or not dotted.strip() or not all(parts):
            raise UserError(f"override '{override}': expected key=value, for example parallel.tp=2")
        if not text.strip():
            raise UserError(f"override '{override}': no value; write {dotted}=null for the default")
        value = parse_yaml(text, source=f"override '{override}'").value
        problem = unknown_key(parts, schema) if value is None else None
        # Below loss. stand a loss's own options, too, for which null is a value.
        takes_out = value is None and (parts[0] != "loss" or problem is None)
        if takes_out and problem is not None:
            # Taking out a key that does not exist would pass validation: the misspelt key is gone.
            raise UserError(f"unknown key '{dotted}' (override '{override}'): {problem}")
        section = _section_to_change(merged, parts[:-1], override)
        touched = {path: by for path, by in touched.items() if path[: len(parts)] != parts}
        touched[parts] = override
        if takes_out or (len(parts) == 1 and value is None):
            section.pop(parts[-1], None)
        else:
            section[parts[-1]] = value
    return merged, touched


def _section_to_change(merged: dict[str, Any], path: tuple[str, ...], override: str) -> dict[str, Any]:
    """The mapping at `path` inside `merged`, made where it is absent."""
    section = merged
    for depth, part in enumerate(path, start=1):
        if section.get(part) is None:  # absent, or written as `reference:` with nothing below
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            held = ".".join(path[:depth])
            raise UserError(f"override '{override}': {held} is {section!r}, not a section; set {held} itself")
    return section


def _validated(tree: dict[str, Any], origins: Origins, schema: type[ConfigT]) -> ConfigT:
    problems = [
        f"{'.'.join(path)} ({origins.of(path)}): expected a finite number, got {value}"
        for path, value in _numbers(tree, ())
        if not math.isfinite(value)
    ]
    if not problems:
        try:
            # Strict JSON rules: "8" is not 8, true is not 1, 2.0 is not a count; yet a list may fill a tuple
            # and a string a Path, which strict Python rules refuse.
            return schema.model_validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            problems = explain(error, origins)
    raise UserError("\n  ".join([f"{origins.file}: {len(problems)} problem(s)", *first_of(problems, 12)]))


def _with_tokenizer_of_model(tree: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.path is model.hf where only the latter is given."""
    model, tokenizer = tree.get("model"), tree.get("tokenizer") or {}
    if not isinstance(model, dict) or not isinstance(tokenizer, dict) or model.get("hf") is None:
        return tree
    return {**tree, "tokenizer": {"path": model["hf"], **tokenizer}}


def _numbers(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, (*path, str(index)))
    elif isinstance(value, float):
        yield path, value


def _kind(value: object) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"


# Commands that take the YAML of any run: which kind it is.


def load_any_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """As load_config, for a run of `sftrl sft` or, where it has a section `rollout`, of `sftrl grpo`."""
    tree = parse_yaml(read_config_text(Path(path)), source=str(path)).value
    is_grpo = isinstance(tree, dict) and "rollout" in tree
    return load_config(path, overrides, schema=GrpoConfig if is_grpo else RunConfig)
