"""config.json files for tests, and what transformers makes of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_config import from_hf_config

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "granite": "Granite",
    "phi3": "Phi3",
    "ministral3": "Ministral3",
    "qwen2_moe": "Qwen2Moe",
    "glm4": "Glm4",
    "glm4_moe": "Glm4Moe",
    "deepseek_v3": "DeepseekV3",
    "mistral4": "Mistral4",
    "minimax_m2": "MiniMaxM2",
    "gpt_oss": "GptOss",
    "gemma3_text": "Gemma3",
    "qwen3_5_text": "Qwen3_5",
    "qwen3_5_moe_text": "Qwen3_5Moe",
    "qwen3_next": "Qwen3Next",
}


def values(model_type: str = "llama", **changes: object) -> dict[str, object]:
    """The keys that have no default, and changes to them."""
    return {
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "vocab_size": 1000,
        "pad_token_id": None,
        # Without it transformers has more heads of keys than of queries.
        **({"num_key_value_heads": 32} if model_type in ("deepseek_v3", "mistral4") else {}),
        **changes,
    }


def read(tmp_path: Path, content: dict[str, object]) -> Architecture:
    """What we make of a config.json, by file and by directory."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert from_hf_config(file) == from_hf_config(tmp_path)
    return from_hf_config(file)


MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3", "mistral4", "gpt_oss")
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
MIXTURES += ("minimax_m2", *HYBRIDS[1:])
OWN_ROPES = (
    "olmo3",
    "phi3",
    "ministral3",
    "glm4",
    "glm4_moe",
    "deepseek_v3",
    "mistral4",
    "minimax_m2",
    "gpt_oss",
    "gemma3_text",
    *HYBRIDS,
)
"""Families that do not read every rope, in the one spelling of the others."""


def transformers_rotary(config: Any, layers: str = "") -> tuple[Tensor, float]:
    """(frequencies, factor on cos and sin) of the rotary module of a transformers configuration's model.

    Args:
        layers: "full_attention_" or "sliding_attention_" in a family with positions for each.
    """
    name = config.model_type
    folder = name.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    text = "Text" if name.startswith("qwen3_5") else ""
    rotary = getattr(module, f"{CLASSES[name]}{text}RotaryEmbedding")(config)
    return getattr(rotary, f"{layers}inv_freq"), getattr(rotary, f"{layers}attention_scaling")


def window_layers_of(config: Any) -> tuple[int | None, tuple[int, ...]]:
    """(window, layers) as the attention modules of transformers' own model carry them."""
    import torch

    from tests.distributed.hf_models import auto_model

    with torch.device("meta"):
        model = auto_model().from_config(config)
    windows = []
    for layer in model.model.layers:
        # These read it from the configuration at each forward.
        reads_config = config.model_type in ("mistral", "mixtral", "phi3", "ministral3")
        owner = config if reads_config else getattr(layer, "self_attn", None)
        windows.append(getattr(owner, "sliding_window", None))
    layers = tuple(number for number, window in enumerate(windows) if window is not None)
    return (windows[layers[0]] if layers else None), layers
