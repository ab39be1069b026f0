"""Random weights in files like those that authors publish, of shapes cut to a few gigabytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sftrl.models.hf_config import from_hf_config
from megatron_sftrl.models.hf_output import plan_files, write_file, write_index
from megatron_sftrl.models.tensors import hf_shapes

FILE_BYTES = 400_000_000
_COMMON = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
_EXPERTS = {"moe_intermediate_size": 768, "num_experts_per_tok": 8, "norm_topk_prob": True}
_ROUTED = {
    **_EXPERTS,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
_EIGHT_BITS = (
    "_proj.weight",
    "_with_mqa.weight",
    ".w1.weight",
    ".w2.weight",
    ".w3.weight",
    "_up_proj",
    "_down_proj",
)
FAMILIES: dict[str, dict] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "num_experts": 64, **_EXPERTS,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 3584,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 60, "num_key_value_heads": 16,
        "moe_intermediate_size": 768, "num_experts_per_tok": 4, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 3072,
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"], "head_dim": 128, "use_qk_norm": True, "attention_bias": True,
        "partial_rotary_factor": 0.5, **_ROUTED,
    },
    # FP8 with factors of blocks of 128 x 128.
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 16, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, **_ROUTED,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"], "head_dim": 128, "intermediate_size": 768,
        "rotary_dim": 64, "num_local_experts": 64, "num_experts_per_tok": 8, "scoring_func": "sigmoid",
        "use_qk_norm": True, "use_routing_bias": True,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
    # Stacks of experts in FP8, with one factor for each matrix.
    "mistral4": {
        "architectures": ["Mistral4ForCausalLM"], "num_key_value_heads": 16, "kv_lora_rank": 256,
        "q_lora_rank": 1024, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "qk_head_dim": 128,
        "v_head_dim": 128, **_ROUTED, "first_k_dense_replace": 0, "max_position_embeddings": 1048576,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 8192,
            "llama_4_scaling_beta": 0.1,
        },
        "quantization_config": {
            "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
        },
    },
    # Stacks of experts in MXFP4.
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], "head_dim": 64, "intermediate_size": 2048,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0,
        "attention_bias": True, "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"], "head_dim": 128, "num_experts": 64, **_EXPERTS,
        "shared_expert_intermediate_size": 512, "linear_num_key_heads": 8, "linear_num_value_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "partial_rotary_factor": 0.25,
    },
    "qwen3_5_moe_text": {
        "architectures": ["Qwen3_5MoeForCausalLM"], "head_dim": 128, "num_experts": 64, **_EXPERTS,
        "shared_expert_intermediate_size": 512, "linear_num_key_heads": 8, "linear_num_value_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
}  # fmt: skip


def write_published(directory: Path, family: str, *, num_bytes: float) -> dict[str, int]:
    """Make the directory, with as many layers as `num_bytes` of bf16 hold; bytes of each tensor in bf16."""
    directory.mkdir()
    few, more = (_bytes(_shapes(directory, family, layers)) for layers in (4, 8))
    layers = max(4, 4 + round((num_bytes - few) / ((more - few) / 4)))
    shapes = _shapes(directory, family, layers)
    stored = _as_stored(shapes, FAMILIES[family].get("quantization_config", {}))
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in stored.items()}
    files = plan_files([*sizes.items()], max_bytes=FILE_BYTES)
    for file in files:
        write_file(directory, file, {name: _random(*stored[name]) for name in file.tensors})
    write_index(directory, files, [*sizes.items()])
    return {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}


def _shapes(directory: Path, family: str, layers: int) -> Mapping[str, tuple[int, ...]]:
    config = {**_COMMON, **FAMILIES[family], "model_type": family, "num_hidden_layers": layers}
    if family == "gpt_oss":
        config["layer_types"] = [("sliding_attention", "full_attention")[each % 2] for each in range(layers)]
    (directory / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(from_hf_config(directory))
    return _stacked(shapes) if family == "mistral4" else shapes


def _stacked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """With one tensor for all gates and second halves of a layer's experts, and one for their outputs."""
    num_experts = FAMILIES["mistral4"]["n_routed_experts"]
    stacked: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer, experts, matrix = name.partition(".experts.0.")
        if ".experts." not in name:
            stacked[name] = shape
        elif experts and matrix != "gate_proj.weight":
            rows, columns = shape
            stack, rows = ("gate_up_proj", 2 * rows) if matrix == "up_proj.weight" else ("down_proj", rows)
            stacked[f"{layer}.experts.{stack}"] = num_experts, rows, columns
    return stacked


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def _as_stored(
    shapes: Mapping[str, tuple[int, ...]], quantised: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what a file holds of each tensor."""
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    method, has_blocks = quantised.get("quant_method"), quantised.get("weight_block_size") is not None
    for name, shape in shapes.items():
        if method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = shape
            stored[f"{name}_blocks"] = (experts, rows, columns // 32, 16), torch.uint8
            stored[f"{name}_scales"] = (experts, rows, columns // 32), torch.uint8
        elif method == "fp8" and name.endswith(_EIGHT_BITS):
            factors = tuple(-(-size // 128) for size in shape) if has_blocks else (*shape[:-2], 1, 1)
            stored[name] = shape, torch.float8_e4m3fn
            stored[f"{name}_scale_inv"] = factors, torch.float32
        elif name.endswith("e_score_correction_bias"):
            stored[name] = shape, torch.float32
        else:
            stored[name] = shape, torch.bfloat16
    return stored


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Finite numbers. Their bits are drawn: drawing normal numbers would take longer than the benchmark."""
    if dtype == torch.bfloat16:
        return torch.randint(0x3C00, 0x3F80, shape, dtype=torch.int16).view(dtype)
    if dtype == torch.float32:
        return torch.rand(shape)
    return torch.randint(100, 120, shape, dtype=torch.uint8).view(dtype)
