"""Small model directories of every kind, written with the libraries' own writers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def some_tensors() -> dict[str, Tensor]:
    """Tensors of the usual ranks and dtypes, each with other values."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(11, 6, generator=generator).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 6, generator=generator),
        "model.layers.0.input_layernorm.weight": torch.randn(6, generator=generator).half(),
        "model.norm.weight": torch.randn(6, generator=generator),
        "lm_head.weight": torch.randn(11, 6, generator=generator).bfloat16(),
    }


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_single(directory: Path, tensors: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
    """A directory with one safetensors file."""
    directory.mkdir(exist_ok=True)
    save_file(dict(tensors), directory / name, metadata={"format": "pt"})
    return directory


def write_sharded(
    directory: Path,
    shards: Mapping[str, Mapping[str, Tensor]],
    *,
    weight_map: Mapping[str, str] | None = None,
    index: str = "model.safetensors.index.json",
) -> Path:
    """A directory with shards and an index that agrees with them unless `weight_map` says otherwise."""
    directory.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(dict(tensors), directory / file, metadata={"format": "pt"})
    agreeing = {name: file for file, tensors in shards.items() for name in tensors}
    content = {"metadata": {"total_size": 0}, "weight_map": agreeing if weight_map is None else weight_map}
    (directory / index).write_text(json.dumps(content))
    return directory
