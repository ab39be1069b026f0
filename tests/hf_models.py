"""Tiny random Hugging Face models as their authors publish them: one file or several, of every dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tests.distributed.hf_models import CONFIGS, auto_model, is_norm_from_zero

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


def write_model(
    directory: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    std: float = 0.2,
    seed: int = 0,
    **changes: object,
) -> Path:
    """Let transformers write a model whose every tensor differs from every other one, biases and norms too.

    Args:
        directory: to make.
        name: in CONFIGS.
        dtype: of the files.
        max_shard_size: of one file; an index when there are several.
        std: standard deviation of the weights. Large enough by default that attention and routing are far
            from uniform: a swap moves the logits.
        seed: of the weights.
        changes: keys of the config.json that shall differ.
    Returns:
        `directory`.
    """
    from transformers import AutoConfig

    model = auto_model().from_config(AutoConfig.for_model(**{**CONFIGS[name], **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if "norm" in parameter_name and not is_norm_from_zero(model.config, parameter_name):
                parameter.add_(1.0)
    model.to(dtype)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):  # fp32 in every file
            buffer.data = torch.randn(buffer.shape, generator=generator)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory, read with safetensors alone."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors


def differing(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits, dtypes and shapes on both sides."""
    return [
        name
        for name in sorted({*expected, *found})
        if name not in expected
        or name not in found
        or expected[name].dtype != found[name].dtype
        or expected[name].shape != found[name].shape
        or not torch.equal(expected[name].view(torch.uint8), found[name].view(torch.uint8))
    ]
