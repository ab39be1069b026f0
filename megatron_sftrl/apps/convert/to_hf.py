"""A checkpoint, converted or of a run, becomes a Hugging Face directory: tensor by tensor, no model built."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.data.tokenizer_backends import PROBES, class_defaults
from megatron_sftrl.engine.checkpoint import StoredTensors, find_checkpoint, stored_assets
from megatron_sftrl.engine.together import new_directory_together, on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, first_of
from megatron_sftrl.models.architecture import Architecture, from_record
from megatron_sftrl.models.hf_config import hf_config_values
from megatron_sftrl.models.hf_output import (
    HfAssets,
    HfFile,
    plan_files,
    with_dtype,
    write_assets,
    write_index,
)
from megatron_sftrl.models.hf_tensor_file import write_safetensors
from megatron_sftrl.models.hf_weights import fill_whole
from megatron_sftrl.models.tensors import MegatronTensor, hf_shapes, megatron_tensors

# The exported tokenizer gives the ids that training saw, also to programs that load it by its class.

_RULES, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"


def with_ids_of_tokenizer_json(assets: HfAssets) -> HfAssets:
    """The same files, with the generic `tokenizer_class` where AutoTokenizer would make other ids without it.

    Training takes its ids from tokenizer.json; transformers and vLLM rebuild the tokenizer from the class
    that tokenizer_config.json or config.json names. Prints a line when the two differ, and else returns the
    same assets, as without a tokenizer.json.
    """
    if _RULES not in assets.files:
        return assets
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_assets(directory, assets)
        text = _first_difference(directory)
        if text is None:
            return assets
        config: dict[str, Any] = json.loads(assets.files.get(_CONFIG, b"{}"))
        before = config.get("tokenizer_class")
        config |= class_defaults(directory, config, _own(directory).get_vocab())
        config["tokenizer_class"] = _GENERIC
        content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        changed = replace(assets, files={**assets.files, _CONFIG: content})
        write_assets(directory, changed)
        left = _first_difference(directory)
    if left is None:
        print(
            f"note: {_CONFIG}: tokenizer_class {before} is now {_GENERIC}: AutoTokenizer made other ids of "
            f"{text!r} with it than {_RULES}, whose ids were trained",
            file=sys.stderr,
        )
        return changed
    print(
        f"note: AutoTokenizer makes other ids of {left!r} than {_RULES}, whose ids were trained, because "
        f"of the model_type in config.json; load the tokenizer with {_GENERIC}.from_pretrained",
        file=sys.stderr,
    )
    return changed


def _own(directory: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(directory / _RULES))


def _first_difference(directory: Path) -> str | None:
    """A text of which AutoTokenizer makes other ids than tokenizer.json; None when there is none."""
    from transformers import AutoTokenizer

    own = _own(directory)
    try:
        theirs: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception:
        # What it cannot load it cannot load wrongly; code beside a tokenizer, say, is left out of exports.
        return None
    for text in PROBES.values():
        if theirs.encode(text, add_special_tokens=False) != own.encode(text, add_special_tokens=False).ids:
            return text
    return None


def convert_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    on_bytes: Callable[[int, int], None],
) -> Path:
    """Write the directory `out`, which transformers and vLLM load; every rank calls it.

    Each process writes whole safetensors files. Memory: two of the largest tensors.

    Args:
        checkpoint: a converted checkpoint, a training checkpoint (its policy is exported), or a run
            directory (its latest checkpoint). Any layout wrote it.
        out: has its name only when it is complete.
        dtype: of the exported weights; None keeps the stored one of each tensor.
        max_file_bytes: size of a safetensors file; a tensor larger than that has a file of its own.
        on_bytes: told (bytes written by this process so far, bytes it will write).
    Raises:
        UserError: on every rank: no or a damaged checkpoint, an output that exists, a full disk.
    """
    verification = find_checkpoint(checkpoint)
    path, architecture = verification.path, from_record(verification.record.architecture)
    stored = on_every_rank(lambda: _stored(path, architecture))
    sizes = _sizes(stored, architecture, dtype)
    files = plan_files(list(sizes.items()), max_bytes=max_file_bytes)
    with closing(stored), new_directory_together(out, num_bytes=sum(sizes.values())) as temporary:
        mine = files[dist.get_rank() :: dist.get_world_size()]
        try:
            on_every_rank(lambda: _write_files(temporary, mine, stored, architecture, dtype, sizes, on_bytes))
        finally:
            # A damaged file is named as such, whatever else went wrong with it before.
            verification.finish()
        on_rank_zero(lambda: write_index(temporary, files, list(sizes.items())))
        assets = _with_config(stored_assets(path), architecture, _main_dtype(stored, dtype))
        on_rank_zero(lambda: write_assets(temporary, with_ids_of_tokenizer_json(assets)))
    return out


def _stored(path: Path, architecture: Architecture) -> StoredTensors:
    """The checkpoint's tensors: all of the table in their shapes; rows of vocabulary padding may follow."""
    stored, problems = StoredTensors(path), []
    for key, tensor in _by_key(architecture).items():
        expected, found = (*tensor.stack, *tensor.shape), stored.shapes.get(f"policy.{key}")
        if found is None:
            problems.append(f"missing: {key}")
        elif found != expected and not (
            tensor.has_padding and found[0] >= expected[0] and found[1:] == expected[1:]
        ):
            problems.append(f"shape of {key}: expected {expected}, got {found}")
    if problems:
        heading = f"checkpoint {path} does not hold the model it describes:"
        raise UserError("\n  ".join([heading, *first_of(problems)]))
    return stored


def _by_key(architecture: Architecture) -> dict[str, MegatronTensor]:
    """One tensor of each key."""
    return {tensor.key: tensor for tensor in megatron_tensors(architecture)}


def _sizes(stored: StoredTensors, architecture: Architecture, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes of each Hugging Face tensor, in the order of the model."""
    shapes, sizes = hf_shapes(architecture), {}
    for tensor in megatron_tensors(architecture):
        item = (dtype or stored.dtypes[f"policy.{tensor.key}"]).itemsize
        for run in tensor.rows:
            sizes[run.name] = torch.Size(shapes[run.name]).numel() * item
    return sizes


def _main_dtype(stored: StoredTensors, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or stored.dtypes["policy.embedding.word_embeddings.weight"]


def _write_files(
    directory: Path,
    files: list[HfFile],
    stored: StoredTensors,
    architecture: Architecture,
    dtype: torch.dtype | None,
    sizes: dict[str, int],
    on_bytes: Callable[[int, int], None],
) -> None:
    total, done = sum(sizes[name] for file in files for name in file.tensors), 0
    sources = {run.name: tensor for tensor in megatron_tensors(architecture) for run in tensor.rows}
    shapes = hf_shapes(architecture)

    def stored_dtype(name: str) -> torch.dtype:
        return stored.dtypes[f"policy.{sources[name].key}"]

    names = [name for file in files for name in file.tensors]
    largest = max((math.prod(shapes[name]) * stored_dtype(name).itemsize for name in names), default=0)
    # One piece of memory for all tensors, one after the other: fresh pages would cost as much as copying.
    memory = np.empty(largest, np.uint8)

    def tensor(name: str) -> Tensor:
        nonlocal done
        shape = shapes[name]
        whole = torch.frombuffer(memory, dtype=stored_dtype(name), count=math.prod(shape)).view(shape)
        _read(whole, name, sources[name], stored)
        done += sizes[name]
        on_bytes(done, total)
        return whole.to(dtype or stored_dtype(name))

    for file in files:
        kinds = {name: (dtype or stored_dtype(name), shapes[name]) for name in file.tensors}
        write_safetensors(directory / file.name, kinds, tensor)


def _read(whole: Tensor, name: str, source: MegatronTensor, stored: StoredTensors) -> None:
    """Fill a Hugging Face tensor from the checkpoint."""
    stack = len(source.index)

    def read_into(part: Tensor, offset: tuple[int, ...]) -> None:
        stacked = part.view((1,) * stack + tuple(part.shape)) if stack else part
        stored.read_into(stacked, f"policy.{source.key}", (*source.index, *offset))

    fill_whole(whole, name, source, read_into)


def _with_config(assets: HfAssets, architecture: Architecture, dtype: torch.dtype) -> HfAssets:
    """The config.json that came with the weights, or one that describes the architecture."""
    if "config.json" in assets.files:
        return with_dtype(assets, dtype)
    text = json.dumps(hf_config_values(architecture, dtype=dtype), indent=2) + "\n"
    return HfAssets(files={**assets.files, "config.json": text.encode()})
