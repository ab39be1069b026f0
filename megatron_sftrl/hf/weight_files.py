"""Which files of a model directory hold its weights, and where each tensor is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sftrl.errors import UserError, error_of, first_of, hub_hint
from megatron_sftrl.hf.headers import read_pickle_header, read_safetensors_header
from megatron_sftrl.hf.stored import StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_FILE = "pytorch_model.bin"
_PICKLE_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """What was found.

    Args:
        tensors: every tensor by its name.
        notes: what a user should know about the choice of the files, for a tool to print.
    """

    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]


def is_old_rope_buffer(name: str) -> bool:
    """Rotary frequencies, which early Llama files hold as a tensor though the config determines them."""
    return name.endswith(".rotary_emb.inv_freq")


def find_weights(directory: Path, *, allow_pickle: bool) -> WeightFiles:
    """Find every tensor of a model directory.

    Preferred as transformers does (modeling_utils._get_resolved_checkpoint_files, 5.19): the file that
    config.json names as transformers_weights, model.safetensors, its index, pytorch_model.bin, its index.

    Args:
        directory: of the model.
        allow_pickle: read pickled weights, as tensors only, when there are no others.
    Returns:
        Where the tensors are.
    Raises:
        UserError: no directory, no weights, pickled weights that are not allowed, broken files, or an index
            that does not agree with its shards.
    """
    if not directory.is_dir():
        raise UserError(
            f"no such directory: {directory}; expected a Hugging Face model directory with config.json and "
            f"{SINGLE_FILE} or {INDEX_FILE}{hub_hint(directory)}"
        )
    name, notes = _choose(directory, allow_pickle=allow_pickle)
    path = directory / name
    if name.endswith(".index.json"):
        return WeightFiles(tensors=_read_sharded(path, is_pickled=name == _PICKLE_INDEX), notes=notes)
    return WeightFiles(tensors=_read_header(path, is_pickled=name == _PICKLE_FILE), notes=notes)


def _choose(directory: Path, *, allow_pickle: bool) -> tuple[str, tuple[str, ...]]:
    """The file or index to read, and what to say about it."""
    if named := _named_in_config(directory):
        return named, (f"{directory}: weights from {named}, which config.json names as transformers_weights",)
    if (directory / SINGLE_FILE).is_file():
        both = (directory / INDEX_FILE).is_file()
        note = (
            f"{directory} holds {SINGLE_FILE} and {INDEX_FILE}: {SINGLE_FILE} is used, as transformers does"
        )
        return SINGLE_FILE, (note,) if both else ()
    if (directory / INDEX_FILE).is_file():
        return INDEX_FILE, ()
    pickled = next((name for name in (_PICKLE_FILE, _PICKLE_INDEX) if (directory / name).is_file()), None)
    if pickled is None:
        found = sorted(path.name for path in directory.iterdir() if path.suffix in _LOOKS_LIKE_WEIGHTS)
        raise UserError(
            f"no weights in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found "
            f"{', '.join(found) if found else 'no weight file at all'}; give the directory of a whole model, "
            "as save_pretrained writes it"
        )
    if not allow_pickle:
        raise UserError(
            f"{directory} holds only pickled weights ({pickled}), expected safetensors: pickled files can "
            "run code when loaded. Convert them to safetensors, or allow it with --allow-pickle "
            "(model.allow_pickle: true in a run's YAML), which reads tensors only (torch's weights_only)"
        )
    return pickled, (f"{directory}: pickled weights ({pickled}) are read with torch's weights_only loading",)


_LOOKS_LIKE_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"})


def _named_in_config(directory: Path) -> str | None:
    """File that config.json asks for; None when it asks for none."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # who reads the config complains about it
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is None:
        return None
    if not _is_plain_name(name) or not str(name).endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"{directory / 'config.json'}: transformers_weights: expected the name of a .safetensors file or "
            f"of its .index.json in the same directory, got {name!r}"
        )
    if not (directory / name).is_file():
        raise UserError(f"{directory / 'config.json'}: transformers_weights names {name}, which is not there")
    return name


def _read_header(path: Path, *, is_pickled: bool) -> dict[str, StoredTensor]:
    return read_pickle_header(path) if is_pickled else read_safetensors_header(path)


def _read_sharded(index: Path, *, is_pickled: bool) -> dict[str, StoredTensor]:
    """Every tensor of the shards of an index."""
    placement = _read_index(index)
    names = sorted(set(placement.values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index} names {len(absent)} of {len(names)} shards that are not there: "
            f"{', '.join(first_of(absent))}; copy or download the missing files"
        )
    shards = {name: _read_header(index.parent / name, is_pickled=is_pickled) for name in names}
    if problems := list(_disagreements(placement, shards)):
        raise UserError("\n  ".join([f"{index} does not agree with its shards:", *first_of(problems)]))
    return {name: shards[shard][name] for name, shard in placement.items()}


def _read_index(index: Path) -> dict[str, str]:
    """Name of the shard of each tensor."""
    try:
        placement = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not placement or not all(isinstance(name, str) for name in placement.values()):
            raise TypeError("weight_map is not a table of file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise error_of(
            f'{index} is no index of shards: expected {{"weight_map": {{tensor: file, ...}}}}, '
            f"got {type(error).__name__}: {error}",
            error,
        ) from error
    if foreign := sorted({name for name in placement.values() if not _is_plain_name(name)}):
        raise UserError(
            f"{index} names shards by paths, which is refused: {', '.join(first_of(foreign))}; expected "
            "names of files beside it"
        )
    return placement


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _disagreements(
    placement: Mapping[str, str], shards: Mapping[str, Mapping[str, StoredTensor]]
) -> Iterator[str]:
    """Each way in which an index and its shards contradict each other."""
    holders: dict[str, list[str]] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            holders.setdefault(name, []).append(shard)
    for name, shard in placement.items():
        if shard not in holders.get(name, ()):
            yield f"{name}: the index says {shard}, which does not hold it"
    for name, found in holders.items():
        if len(found) > 1:
            yield f"{name}: in {len(found)} shards: {', '.join(found)}"
        if name not in placement and not is_old_rope_buffer(name):
            yield f"{name}: in {found[0]}, but not in the index"
