"""Writing a Hugging Face model directory: complete under its name, or not there at all.

my-model/        complete: the name exists only after everything in it is on the disk
.my-model.tmp/   being written, .lock in it held by its writer; left over when a process was killed
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError, error_of, hub_hint
from megatron_sftrl.models.hf_hybrids import language_model_values
from megatron_sftrl.models.hf_tensor_file import write_safetensors
from megatron_sftrl.models.hf_weights import INDEX_FILE, SINGLE_FILE
from megatron_sftrl.models.tokenizer_files import (
    TEKKEN,
    TEMPLATE,
    TOKENIZER_FILES,
    find_tokenizer,
    has_vocabulary,
    single_sentencepiece,
)

# What travels beside weights: the model's configuration, its tokenizer and its chat template, as files.


CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_MODEL_FILES = (CONFIG, GENERATION_CONFIG)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMED_TEMPLATES = "additional_chat_templates"
_SENTENCEPIECE = "tokenizer.model"  # as transformers looks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class HfAssets:
    """Files of a model directory that are not weights: content by name.

    A name may have one folder in front (additional_chat_templates/rag.jinja).
    """

    files: Mapping[str, bytes]


def read_assets(*, model: Path | None, tokenizer: Path | None, chat_template: Path | None) -> HfAssets:
    """Read what belongs beside exported weights; never code, never weights.

    Args:
        model: directory with config.json, and generation_config.json if it has one.
        tokenizer: Hugging Face tokenizer directory (a model directory is one), a SentencePiece model, or a
            tekken.json.
        chat_template: Jinja file that replaces every chat template of the tokenizer.
    Raises:
        UserError: a path that is not there, cannot be read, or holds none of these files.
    """
    files: dict[str, bytes] = {}
    if model is not None:
        files |= _read_named(Path(model), _MODEL_FILES)
        if CONFIG not in files:
            raise UserError(f"no {CONFIG} in {model}: expected a Hugging Face model directory")
        files[CONFIG] = _without_what_stays(files[CONFIG])
    if tokenizer is not None:
        files |= _read_tokenizer(Path(tokenizer))
    if chat_template is not None:
        files = _with_template(files, _read(Path(chat_template)))
    return HfAssets(files=files)


def _without_what_stays(config: bytes) -> bytes:
    """A config.json without keys about what is not carried along: code, weights of fewer bits, and what a
    multimodal model has beside its language model.
    """
    values = _json_object(config, CONFIG)
    left_out = ("auto_map", "quantization_config")
    kept = {key: value for key, value in language_model_values(values).items() if key not in left_out}
    return config if kept == values else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def with_dtype(assets: HfAssets, dtype: torch.dtype) -> HfAssets:
    """New assets with the dtype of the weights in their config.json, the rest of which stays as it was.

    The key is `dtype`, or `torch_dtype` where the file uses that older one.
    """
    values = _json_object(assets.files[CONFIG], CONFIG)
    text = assets.files[CONFIG].decode("utf-8")
    name = str(dtype).removeprefix("torch.")
    # A file with both keys gets both: transformers 5 prefers dtype, readers of the older key know no other.
    keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]
    wanted = values | dict.fromkeys(keys, name)
    edited = re.sub(
        r'("(?:torch_)?dtype"\s*:\s*)(?:"[^"\\]*"|null)', lambda match: f'{match[1]}"{name}"', text
    )
    if json.loads(edited) != wanted:
        # No such key yet, or one that belongs to something nested.
        edited = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
    return HfAssets(files={**assets.files, CONFIG: edited.encode("utf-8")})


def with_keys(
    assets: HfAssets,
    added: Mapping[str, object],
    *,
    instead: Mapping[str, object] | None = None,
    without: Collection[str] = (),
) -> HfAssets:
    """New assets with `added` keys in their config.json where it has none of the name, with the values of
    `instead` where it has, and without some.
    """
    before = _json_object(assets.files[CONFIG], CONFIG)
    values = {key: value for key, value in {**added, **before}.items() if key not in without}
    values |= {key: value for key, value in (instead or {}).items() if values.get(key, value) != value}
    if values == before:
        return assets
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return HfAssets(files={**assets.files, CONFIG: text.encode("utf-8")})


def end_ids(assets: HfAssets) -> tuple[int, ...]:
    """The ids at which transformers and vLLM end a response of these files' model, in their order.

    They are those of generation_config.json; where there is no such file, config.json's.

    Raises:
        UserError: an eos_token_id that is neither an id nor a list of ids.
    """
    name = GENERATION_CONFIG if GENERATION_CONFIG in assets.files else CONFIG
    if name not in assets.files:
        return ()
    value = _json_object(assets.files[name], name).get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    ids = tuple(each for each in values if isinstance(each, int) and not isinstance(each, bool))
    if len(ids) < len(values):
        raise UserError(f"{name}: eos_token_id: expected an id or a list of ids, got {value!r}")
    return ids


def with_end_ids(assets: HfAssets, ends: Collection[int]) -> HfAssets:
    """Assets (with a config.json) whose generation_config.json and config.json end at all of `ends` as well.

    Missing ids come first: a reader of one id alone takes what was trained. The same object when none is
    missing.
    """
    present = end_ids(assets)
    missing = sorted(set(ends) - set(present))
    if not missing:
        return assets
    config = _json_object(assets.files[CONFIG], CONFIG)
    # Readers take a generation_config.json as a whole, so a new one says what config.json has said so far.
    made = {name: config[name] for name in _TOKEN_IDS if name in config}
    generation = assets.files.get(GENERATION_CONFIG)
    values = {
        CONFIG: config,
        GENERATION_CONFIG: made if generation is None else _json_object(generation, GENERATION_CONFIG),
    }
    changed = {
        name: json.dumps(each | {"eos_token_id": [*missing, *present]}, indent=2, ensure_ascii=False) + "\n"
        for name, each in values.items()
    }
    return HfAssets(files={**assets.files, **{name: text.encode() for name, text in changed.items()}})


def write_assets(directory: Path, assets: HfAssets) -> None:
    """Write the files; `new_directory` forces them to the disk."""
    for name, content in assets.files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _read_tokenizer(tokenizer: Path) -> dict[str, bytes]:
    if not tokenizer.is_dir():
        kind, file = find_tokenizer(tokenizer)
        return {TEKKEN if kind == "tekken" else _SENTENCEPIECE: _read(file)}
    files = _read_named(tokenizer, TOKENIZER_FILES)
    if not has_vocabulary(set(files)) and (model := single_sentencepiece(tokenizer)) is not None:
        files[_SENTENCEPIECE] = _read(model)
    if not files:
        raise UserError(f"no tokenizer in {tokenizer}: expected tokenizer.json, tokenizer.model or the like")
    for path in sorted((tokenizer / _NAMED_TEMPLATES).glob("*.jinja")):
        files[f"{_NAMED_TEMPLATES}/{path.name}"] = _read(path)
    return files


def _with_template(files: Mapping[str, bytes], template: bytes) -> dict[str, bytes]:
    """The files with one chat template and no other.

    transformers prefers chat_template.jinja over the key in tokenizer_config.json, but readers that do not
    know the file would go on with the replaced one, and tools would bring a named template back.
    """
    kept = {
        name: content
        for name, content in files.items()
        if name != "chat_template.json" and not name.startswith(_NAMED_TEMPLATES + "/")
    }
    if config := kept.get("tokenizer_config.json"):
        values = _json_object(config, "tokenizer_config.json")
        if values.pop("chat_template", None) is not None:
            kept["tokenizer_config.json"] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return {**kept, TEMPLATE: template}


def _json_object(content: bytes, name: str) -> dict[str, object]:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected a JSON object, got a {type(values).__name__}")
    return values


def _read_named(directory: Path, names: Iterable[str]) -> dict[str, bytes]:
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}{hub_hint(directory)}")
    return {name: _read(directory / name) for name in sorted(names) if (directory / name).is_file()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise error_of(f"cannot read {path}: {error.strerror}", error) from error


# Forcing written data to the disk.


def force_to_disk(path: Path) -> None:
    """Return when a file's content, or a directory's names, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK = ".lock"
"""Name of the file in a temporary directory that says that its writer lives; it goes before the renaming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfFile:
    """A weight file of a model directory, and the names of its tensors."""

    name: str
    tensors: tuple[str, ...]


def plan_files(sizes: Sequence[tuple[str, int]], *, max_bytes: int) -> list[HfFile]:
    """Spread tensors of (name, bytes) over files in their order, as huggingface_hub's split does.

    Args:
        max_bytes: of the tensors of one file; a larger tensor gets a file of its own.
    Returns:
        The files; one named model.safetensors, or several with their number in the name.
    """
    assert sizes
    assert len({name for name, _ in sizes}) == len(sizes), "a tensor is named twice"
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes:
        if size > max_bytes:
            groups.append([name])
            continue
        if filled + size > max_bytes:
            groups.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    if current:
        groups.append(current)
    if len(groups) == 1:
        return [HfFile(name=SINGLE_FILE, tensors=tuple(groups[0]))]
    return [
        HfFile(name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors=tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_file(directory: Path, file: HfFile, tensors: Mapping[str, Tensor]) -> None:
    """Write a weight file of (at least) these CPU, contiguous tensors and force it to the disk."""
    kinds = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in file.tensors}
    write_safetensors(directory / file.name, kinds, lambda name: tensors[name])


def write_index(directory: Path, files: Sequence[HfFile], sizes: Sequence[tuple[str, int]]) -> None:
    """Write the index of several weight files; a single one needs none."""
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(size for _, size in sizes)},
        "weight_map": {name: file.name for file in files for name in file.tensors},
    }
    path = directory / INDEX_FILE
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    force_to_disk(path)


def temporary_directory(out: Path) -> Path:
    """Where the files of `out` are written until all of them are there."""
    return out.parent / f".{out.name}.tmp"


@contextmanager
def new_directory(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """Make a directory in one step: the block fills a temporary, empty one, which then gets its name.

    One process enters this; others may write into `temporary_directory(out)` until the block ends. An error
    in the block removes the temporary directory; what a killed process left is removed by the next one.

    Args:
        out: that does not exist; its parents are made.
        num_bytes: about as much as will be written.
    Raises:
        UserError: `out` exists, another process is writing it, or the disk has not the space.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_directory(out)
    _remove_left_over(temporary, out)
    _check_space(out, num_bytes)
    temporary.mkdir()
    # The kernel takes the lock away from a killed process.
    lock = os.open(temporary / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        _lock(lock)
        yield temporary
        (temporary / LOCK).unlink()
        for path in sorted(temporary.rglob("*")):
            force_to_disk(path)
        force_to_disk(temporary)
        refuse_existing(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    force_to_disk(out.parent)


def refuse_existing(out: Path) -> None:
    """Raise UserError where something has this name already."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: choose another --out, or remove it")


def _remove_left_over(temporary: Path, out: Path) -> None:
    """Remove what a killed process left, but not what a living one is writing."""
    if not os.path.lexists(temporary):
        return
    if temporary.is_symlink() or not temporary.is_dir():
        raise UserError(
            f"{temporary} is in the way: expected no such file, or a directory left by us; remove it"
        )
    try:
        lock = os.open(temporary / LOCK, os.O_RDWR)
    except FileNotFoundError:  # killed right before the renaming
        shutil.rmtree(temporary)
        return
    try:
        if not _lock(lock):
            raise UserError(
                f"another process is writing {out} at the moment: wait for it, or choose another --out"
            )
        shutil.rmtree(temporary)
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks (Lustre without -o flock): two writers are not told apart
    return True


def _check_space(out: Path, num_bytes: int) -> None:
    disk = shutil.disk_usage(out.parent)
    # Some network file systems report no sizes at all.
    if disk.total > 0 and disk.free < num_bytes:
        raise UserError(
            f"the disk is too full: {out} needs about {num_bytes / 1e9:.3f} GB and {out.parent} has "
            f"{disk.free / 1e9:.3f} GB left; free space or choose an --out on another disk"
        )
