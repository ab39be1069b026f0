"""A checkpoint of adapters (LoRA) becomes a Hugging Face directory with them merged, or PEFT's directory."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.checkpoint import find_checkpoint
from megatron_sftrl.engine.together import new_directory_together, on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, from_record
from megatron_sftrl.models.hf_output import HfFile, plan_files, write_index
from megatron_sftrl.models.hf_tensor_file import write_safetensors
from megatron_sftrl.models.hf_weights import HfWeights
from megatron_sftrl.models.tensors import FileTensor, file_tensors
from megatron_sftrl.trainers.adapters import MergedWeights, StoredAdapters

LOGGER = logging.getLogger(__name__)


def write_merged(
    path: Path,
    lora: Mapping[str, Any],
    architecture: Architecture,
    temporary: Path,
    weights: HfWeights,
    *,
    dtype: torch.dtype,
    max_file_bytes: int,
    on_bytes: Callable[[int, int], None],
) -> None:
    """The weight files and their index of a merged model; each rank writes whole files."""
    tensors = file_tensors(architecture)
    sizes = {name: math.prod(each.shape) * dtype.itemsize for name, each in tensors.items()}
    files = plan_files(list(sizes.items()), max_bytes=max_file_bytes)
    mine = files[dist.get_rank() :: dist.get_world_size()]

    def write() -> None:
        with closing(StoredAdapters(path, lora, architecture.vocab_size)) as adapters:
            merged = MergedWeights(weights, adapters)
            _write_files(temporary, mine, merged, sizes, tensors, dtype, on_bytes)

    on_every_rank(write)
    on_rank_zero(lambda: write_index(temporary, files, list(sizes.items())))


def _write_files(
    directory: Path,
    files: Sequence[HfFile],
    weights: MergedWeights,
    sizes: Mapping[str, int],
    tensors: Mapping[str, FileTensor],
    dtype: torch.dtype,
    on_bytes: Callable[[int, int], None],
) -> None:
    total, done = sum(sizes[name] for file in files for name in file.tensors), 0

    def tensor(name: str) -> Tensor:
        nonlocal done
        done += sizes[name]
        on_bytes(done, total)
        shape, parts = tensors[name].shape, tensors[name].parts
        read = [weights.read(part).to(dtype) for part in parts]
        return read[0] if len(read) == 1 else torch.cat(read).view(shape)

    for file in files:
        kinds = {name: (dtype, tensors[name].shape) for name in file.tensors}
        write_safetensors(directory / file.name, kinds, tensor)


def convert_to_peft(checkpoint: Path, out: Path) -> Path:
    """Write the directory `out` with the adapters of a checkpoint, which PEFT loads; every rank calls it.

    Raises:
        UserError: on every rank: no checkpoint of adapters, a damaged one, or an output that exists.
    """
    verification = find_checkpoint(checkpoint)
    path, record = verification.path, verification.finish()
    lora = record.lora
    if lora is None:
        raise UserError(f"{path} holds a whole model and no adapters: export it without --adapters")
    architecture = from_record(record.architecture)
    with closing(StoredAdapters(path, lora, architecture.vocab_size)) as adapters:
        num_bytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in adapters.kinds.values())
        passed_over = passed_over_by_peft(adapters.kinds, architecture.family)
        if passed_over and dist.get_rank() == 0:
            LOGGER.warning(
                "PEFT over transformers 5 passes over the adapters of %d matrices without a word (%s, ...): "
                "it takes their names for those of stacked experts, or of what stands beside these. Its "
                "numbers would not be the run's; without --adapters they are merged",
                len(passed_over),
                passed_over[0],
            )
        with new_directory_together(out, num_bytes=num_bytes) as temporary:
            on_rank_zero(lambda: _write_peft(temporary, adapters))
    return out


def passed_over_by_peft(names: Collection[str], family: str) -> list[str]:
    """Of a mixture, the matrices whose adapters PEFT (0.21.2) does not load where others have their names.

    Where it puts experts' adapters together, all matrices of such a name are experts' to it: those of dense
    layers and shared experts are lost. With Qwen2-MoE, Qwen3.5-MoE and Mistral 4 it does not, and the
    experts' are lost.

    Args:
        names: of tensors, as StoredAdapters.kinds has them.
    """
    modules = sorted({name.rsplit(".", 2)[0] for name in names if ".lora_" in name})
    in_experts = [module for module in modules if ".experts." in module]
    if family in ("qwen2_moe", "qwen3_5_moe_text", "mistral4"):
        return in_experts
    stacked = {module.split(".")[-1] for module in in_experts}
    return [module for module in modules if module not in in_experts and module.split(".")[-1] in stacked]


def _write_peft(directory: Path, adapters: StoredAdapters) -> None:
    outer = "base_model.model."
    write_safetensors(
        directory / "adapter_model.safetensors",
        {outer + name: kind for name, kind in adapters.kinds.items()},
        lambda name: adapters.read(name.removeprefix(outer)),
    )
    lora = adapters.lora
    config = {
        "base_model_name_or_path": lora["base_path"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(lora["alpha"]) if float(lora["alpha"]).is_integer() else lora["alpha"],
        "lora_dropout": lora["dropout"],
        "modules_to_save": lora.get("modules_to_save"),
        "peft_type": "LORA",
        "r": lora["rank"],
        "target_modules": lora["targets"],
        "task_type": "CAUSAL_LM",
        "use_rslora": lora["rslora"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
