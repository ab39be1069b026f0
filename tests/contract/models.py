"""Two versions of tiny random models, saved by transformers, and what transformers generates with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.hf_models import CONFIGS, auto_model, is_norm_from_zero


def longrope(original_length: int) -> dict[str, Any]:
    """Changes to phi3_longrope for heads of 32, of which 24 dimensions turn."""
    factors = {
        "short_factor": [1 + 0.1 * number for number in range(12)],
        "long_factor": [1 + 2.0 * number for number in range(12)],
    }
    return {
        "rope_parameters": {**CONFIGS["phi3_longrope"]["rope_parameters"], **factors},
        "original_max_position_embeddings": original_length,
        "max_position_embeddings": 4 * original_length,
    }


# Heads of 32: the smallest that vLLM's attention for the CPU knows. Experts of 64: a multiple of its tiles.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
VOCAB_SIZE = 101
NAMES = ("llama", "llama_tied", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss")
OTHER_NAMES = ("smollm3", "olmo2", "olmo3", "granite", "phi3", "phi3_longrope", "ministral3", "qwen2_moe")
OTHER_NAMES += ("glm4", "gemma3_text", "glm4_moe", "deepseek_v3", "mistral4", "minimax_m2")
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "deepseek_v3": {
        "num_key_value_heads": None,
        "head_dim": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 48,
        "v_head_dim": 32,
        "kv_lora_rank": 64,
        "moe_intermediate_size": 64,
    },
    "glm4_moe": {"moe_intermediate_size": 64},
    "minimax_m2": {"rotary_dim": 16},
    "gpt_oss": {"swiglu_limit": 7.0},
    "phi3_longrope": longrope(256),
}
EXPERTS["mistral4"] = {**EXPERTS["deepseek_v3"], "head_dim": 64}


@dataclass(frozen=True)
class Versions:
    """Directories of one model with different weights, in the order of the updates."""

    name: str
    directories: tuple[Path, ...]
    has_large_logits: bool


def save_versions(
    name: str, root: Path, *, num_versions: int, has_large_logits: bool = False, **others: Any
) -> Versions:
    """Write the named model `num_versions` times, each with weights of its own seed.

    Args:
        has_large_logits: up to 7, about a trained model's. Otherwise their standard deviation is near
            0.25: two versions differ by 0.3 nats, 10^5 tolerances, and rounding in fp32, which grows with the
            logits, stays below a tolerance of 1e-6.
        others: keys of the config.json that shall differ.
    """
    from transformers import AutoConfig

    changes = {**SIZES, **EXPERTS.get(name, {}), **others}
    end_std = 0.13 if has_large_logits else 0.02
    directories = []
    for seed in range(num_versions):
        config = AutoConfig.for_model(**{**CONFIGS[name], **changes})
        model = auto_model().from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # Attention and routing far from uniform.
                is_end = "embed_tokens" in parameter_name or "lm_head" in parameter_name
                parameter.normal_(std=end_std if is_end else 0.1, generator=generator)
                if "norm" in parameter_name and not is_norm_from_zero(config, parameter_name):
                    parameter.add_(1.0)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.1, generator=generator)
        directories.append(root / f"{name}-{seed}")
        model.save_pretrained(directories[-1])
    return Versions(name=name, directories=tuple(directories), has_large_logits=has_large_logits)


@torch.no_grad()
def scores(
    directory: Path, sequences: Sequence[Sequence[int]], *, temperature: float, dtype: torch.dtype
) -> list[Tensor]:
    """[T - 1] float64 nats of each token but the first, by transformers; the model computes in dtype."""
    model = auto_model().from_pretrained(directory, dtype=dtype).eval()
    found = []
    for tokens in sequences:
        logits = model(torch.tensor([tokens])).logits[0, :-1].double() / temperature
        found.append(logits.log_softmax(1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0])
    return found


@torch.no_grad()
def greedy_tokens(
    directory: Path, prompts: Sequence[tuple[int, ...]], *, num_new: int
) -> list[tuple[int, ...]]:
    """What transformers continues each prompt with, the whole sequence run anew for each token."""
    model = auto_model().from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(num_new):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tuple(tokens[len(prompt) :]))
    return found
