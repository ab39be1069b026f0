"""A checkpoint, converted or of a run, becomes a Hugging Face directory: tensor by tensor, no model built."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.apps.convert.adapters import write_merged
from megatron_sftrl.data.tokenizer_backends import PROBES, class_defaults
from megatron_sftrl.engine.checkpoint import CheckpointRecord, StoredModel, find_checkpoint, stored_assets
from megatron_sftrl.engine.together import new_directory_together, on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, from_record
from megatron_sftrl.models.hf_config import hf_config_values
from megatron_sftrl.models.hf_families import hf_family
from megatron_sftrl.models.hf_output import (
    HfAssets,
    HfFile,
    plan_files,
    with_dtype,
    with_keys,
    write_assets,
    write_index,
)
from megatron_sftrl.models.hf_positions import FOR_VLLM
from megatron_sftrl.models.hf_tensor_file import write_safetensors
from megatron_sftrl.models.tensors import FileTensor, file_tensors, hf_shapes, megatron_tensors
from megatron_sftrl.trainers.adapters import open_base

# The exported tokenizer gives the ids that training saw, also to programs that load it by its class.

_EMBEDDING = "model.embed_tokens.weight"
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
        config |= class_defaults(directory, config, config, _own(directory).get_vocab())
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
    base: Path | None = None,
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
        base: of a checkpoint of adapters, where the model is that they are merged into; None for the place
            that the run read it from.
    Raises:
        UserError: on every rank: no or a damaged checkpoint, another base, an output that exists, full disk.
    """
    verification = find_checkpoint(checkpoint)
    path, architecture = verification.path, from_record(verification.record.architecture)
    if verification.record.lora is not None:
        verification.finish()
        _convert_merged(path, verification.record, out, dtype, max_file_bytes, on_bytes, base)
        return out
    if base is not None:
        raise UserError(f"--base has no effect: {path} holds a whole model and no adapters")
    stored = on_every_rank(lambda: StoredModel(path, architecture))
    dtypes, tensors = _dtypes(stored, architecture, dtype), file_tensors(architecture)
    sizes = {name: math.prod(each.shape) * dtypes[each.parts[0]].itemsize for name, each in tensors.items()}
    files = plan_files(list(sizes.items()), max_bytes=max_file_bytes)
    with closing(stored), new_directory_together(out, num_bytes=sum(sizes.values())) as temporary:
        mine = files[dist.get_rank() :: dist.get_world_size()]
        try:
            on_every_rank(lambda: _write_files(temporary, mine, stored, tensors, dtypes, on_bytes))
        finally:
            # A damaged file is named as such, whatever else went wrong with it before.
            verification.finish()
        on_rank_zero(lambda: write_index(temporary, files, list(sizes.items())))
        assets = _with_config(stored_assets(path), architecture, dtypes[_EMBEDDING])
        on_rank_zero(lambda: write_assets(temporary, with_ids_of_tokenizer_json(assets)))
    return out


def _convert_merged(
    path: Path,
    record: CheckpointRecord,
    out: Path,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    on_bytes: Callable[[int, int], None],
    base: Path | None,
) -> None:
    """convert_to_hf of a checkpoint of adapters, merged in fp32 and rounded once."""
    assert record.lora is not None
    architecture = from_record(record.architecture)
    chosen = dtype or {"bf16": torch.bfloat16, "fp32": torch.float32}[record.dtype]
    num_bytes = sum(math.prod(shape) for shape in hf_shapes(architecture).values()) * chosen.itemsize
    with (
        open_base(path, record.lora, architecture, base) as weights,
        new_directory_together(out, num_bytes=num_bytes) as temporary,
    ):
        write_merged(
            path,
            record.lora,
            architecture,
            temporary,
            weights,
            dtype=chosen,
            max_file_bytes=max_file_bytes,
            on_bytes=on_bytes,
        )
        assets = _with_config(stored_assets(path), architecture, chosen)
        on_rank_zero(lambda: write_assets(temporary, with_ids_of_tokenizer_json(assets)))


def _dtypes(
    stored: StoredModel, architecture: Architecture, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Of each Hugging Face tensor, in the order of the model; None keeps the stored one."""
    always = {run.name for tensor in megatron_tensors(architecture) if tensor.is_fp32 for run in tensor.rows}
    return {name: torch.float32 if name in always else dtype or stored.dtypes[name] for name in stored.shapes}


def _write_files(
    directory: Path,
    files: list[HfFile],
    stored: StoredModel,
    tensors: Mapping[str, FileTensor],
    wanted: dict[str, torch.dtype],
    on_bytes: Callable[[int, int], None],
) -> None:
    done = 0
    # The parts of a tensor are alike.
    kinds = {
        name: (wanted[tensors[name].parts[0]], tensors[name].shape) for file in files for name in file.tensors
    }
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in kinds.items()}
    total = sum(sizes.values())
    held = {name: stored.dtypes[tensors[name].parts[0]] for name in kinds}
    largest = max((math.prod(tensors[name].shape) * held[name].itemsize for name in kinds), default=0)
    # One piece of memory for all tensors, one after the other: fresh pages would cost as much as copying.
    memory = np.empty(largest, np.uint8)

    def tensor(name: str) -> Tensor:
        nonlocal done
        dtype, shape = kinds[name]
        whole, parts = torch.frombuffer(memory, dtype=held[name], count=math.prod(shape)), tensors[name].parts
        for part, values in zip(parts, whole.chunk(len(parts)), strict=True):
            stored.read_into(values.view(stored.shapes[part]), part)
        done += sizes[name]
        on_bytes(done, total)
        return whole.view(shape).to(dtype)

    for file in files:
        write_safetensors(directory / file.name, {name: kinds[name] for name in file.tensors}, tensor)


def _with_config(assets: HfAssets, architecture: Architecture, dtype: torch.dtype) -> HfAssets:
    """The config.json that came with the weights and what vLLM needs in it, or the architecture's."""
    values = hf_config_values(architecture, dtype=dtype)
    if "config.json" in assets.files:
        line = hf_family(architecture.family)
        added = {key: values[key] for key in (*FOR_VLLM, *line.for_vllm) if key in values}
        changed = {
            **dict.fromkeys(line.draft_keys, 0),
            "model_type": architecture.family,
            "tie_word_embeddings": architecture.tie_embeddings,
        }
        # Weights that were dequantised while they were read are written as they were trained.
        return with_keys(with_dtype(assets, dtype), added, instead=changed, without=("quantization_config",))
    text = json.dumps(values, indent=2) + "\n"
    return HfAssets(files={**assets.files, "config.json": text.encode()})
