"""Tiny random Hugging Face models of every family and every request of a config.json, and their logits.

transformers builds, saves and runs them; nothing of ours takes part, so they are the truth for the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 101  # divides by no tp size
WINDOW = 16
ORIGINAL_LENGTH = 64

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
_DEEP = {**_BASE, "num_hidden_layers": 4}
_LLAMA = {"model_type": "llama", **_BASE}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
_QWEN3 = {"model_type": "qwen3", **_BASE, "head_dim": 8}
_WINDOW_ON_TOP = {
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 2,
}
_MIXTRAL = {"model_type": "mixtral", **_BASE, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
_GLM4_MOE = {
    "model_type": "glm4_moe",
    **_DEEP,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    **_DEEP,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_MINIMAX_M2 = {
    "model_type": "minimax_m2",
    **_DEEP,
    "intermediate_size": 24,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    **_DEEP,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": WINDOW,
    "rope_parameters": {**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
}

_HYBRID = {
    **_DEEP,
    "head_dim": 16,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
}
_SHARED_EXPERT = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_tied": {**_LLAMA, "tie_word_embeddings": True},
    "llama_wide_heads": {**_LLAMA, "head_dim": 16},
    "llama_linear": {
        **_LLAMA,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama_llama3": {
        **_LLAMA,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,  # wavelengths on both sides of the interpolated band, and in it
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
        },
    },
    "llama_yarn": {**_LLAMA, "rope_parameters": _YARN},
    "qwen3_yarn_given_factor": {**_QWEN3, "rope_parameters": {**_YARN, "attention_factor": 0.8}},
    "mistral": {"model_type": "mistral", **_BASE, "sliding_window": WINDOW},
    "mistral_without_window": {"model_type": "mistral", **_BASE, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **_BASE},
    "qwen2_window": {"model_type": "qwen2", **_BASE, **_WINDOW_ON_TOP, "tie_word_embeddings": True},
    "qwen3": _QWEN3,
    "qwen3_window": {**_QWEN3, **_WINDOW_ON_TOP},
    "mixtral": _MIXTRAL,
    "mixtral_window": {**_MIXTRAL, "sliding_window": WINDOW},
    "qwen3_moe": {**_QWEN3_MOE, "norm_topk_prob": True},
    "qwen3_moe_unnormalized": {**_QWEN3_MOE, "norm_topk_prob": False},
    # Every second layer without positions, and under a window.
    "smollm3": {
        "model_type": "smollm3",
        **_DEEP,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "olmo2": {"model_type": "olmo2", **_DEEP},
    # One layer in four attends to all, and has positions of its own.
    "olmo3": {
        "model_type": "olmo3",
        **_DEEP,
        "sliding_window": WINDOW,
        "rope_parameters": {
            "full_attention": {**_YARN, "attention_factor": 1.2},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "granite": {
        "model_type": "granite",
        **_DEEP,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3",
        **_DEEP,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "sliding_window": WINDOW,
    },
    # As Phi-4-mini: more positions than the original length, which sequences here keep to. Without a window
    # transformers' own fp32 gradients are 3.6e-5 away from float64 (measured).
    "phi3_longrope": {
        "model_type": "phi3",
        **_DEEP,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.13, 2.5],
            "long_factor": [1.1, 7.0, 32.5],
        },
        "original_max_position_embeddings": 2 * ORIGINAL_LENGTH,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    # With four layers transformers' own fp32 gradients of a GLM-4 are 2e-5 away from float64 (measured).
    "ministral3": {
        "model_type": "ministral3",
        **_BASE,
        "head_dim": 16,
        # A query at position 24, 48, ... is longer than the one before.
        "rope_parameters": {**_YARN, "original_max_position_embeddings": 24, "llama_4_scaling_beta": 0.3},
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_BASE,
        **_SHARED_EXPERT,
    },
    "glm4": {"model_type": "glm4", **_BASE, "head_dim": 16, "attention_bias": True},
    # Groups of experts, of which a token visits two each; biases and norms of q and k.
    "glm4_moe": {
        **_GLM4_MOE,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    # Groups, yarn with both multipliers, two shared experts; then queries out of the residual stream. With
    # four layers transformers' own fp32 gradients of the first are 1.5e-5 away from float64 (measured).
    "deepseek_v3": {
        **_DEEPSEEK_V3,
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    },
    "deepseek_v3_plain": {**_DEEPSEEK_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    # Of two layers one is dense; weights of experts times a factor. A query at 24, 48, ... is longer. Then
    # queries out of the residual stream, and weights that are not normalised: with more than one layer of
    # experts transformers' own fp32 gradients are 2.4e-5 away from float64 (measured).
    "mistral4": {
        **_DEEPSEEK_V3,
        "model_type": "mistral4",
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {
            **_YARN,
            "original_max_position_embeddings": 24,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "mistral4_plain": {
        **_DEEPSEEK_V3,
        "model_type": "mistral4",
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "first_k_dense_replace": 3,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1},
    },
    # Then six query heads a key head, as published, and the share that turns in the newer spelling.
    "minimax_m2": _MINIMAX_M2,
    "minimax_m2_published": {
        **{key: value for key, value in _MINIMAX_M2.items() if key != "rotary_dim"},
        "hidden_size": 48,
        "num_attention_heads": 12,
        "head_dim": 8,
        "num_local_experts": 12,
        "num_experts_per_tok": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    },
    "gpt_oss": {**_GPT_OSS, "swiglu_limit": 0.6},
    "gpt_oss_other_gates": {
        **_GPT_OSS,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "swiglu_alpha": 1.2,
        "layer_types": [*["full_attention"] * 2, "sliding_attention", "full_attention"],
        "rope_parameters": {**_YARN, "truncate": True, "attention_factor": 1.2},
    },
    # Two layers in three with a window and with positions of their own; the others' are scaled.
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_DEEP,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3_text_published": {
        "model_type": "gemma3_text",
        **_DEEP,
        "num_hidden_layers": 8,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    # Two value heads a key head; all but every second layer without attention.
    "qwen3_5_text": {"model_type": "qwen3_5_text", **_HYBRID},
    "qwen3_5_text_published": {
        "model_type": "qwen3_5_text",
        **_HYBRID,
        "full_attention_interval": 4,
        "linear_num_value_heads": 6,
        "tie_word_embeddings": True,
    },
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text",
        **_HYBRID,
        **_SHARED_EXPERT,
        "num_hidden_layers": 2,
    },
    "qwen3_next": {"model_type": "qwen3_next", **_HYBRID, **_SHARED_EXPERT},
    "glm4_moe_ungrouped": {**_GLM4_MOE, "n_shared_experts": 2, "first_k_dense_replace": 3},
}


def auto_model() -> Any:
    """transformers' AutoModelForCausalLM, told of the one class that its table (5.19) has not got."""
    from transformers import AutoModelForCausalLM, Mistral4Config, Mistral4ForCausalLM

    AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)
    return AutoModelForCausalLM


def save_model(name: str, directory: Path, *, seed: int = 0) -> Any:
    """Write the named model to `directory` and return it, fp32, with weights that bf16 represents exactly.

    It runs transformers' default attention, sdpa, where the model has it: the eager one is at 4200 tokens in
    fp32 up to 1.2e-5 of the logit scale away from float64 (measured), more than the bound between it and us.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**CONFIGS[name])
    torch.manual_seed(seed)
    attention = "eager" if config.model_type == "gpt_oss" else "sdpa"
    model = auto_model().from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Large enough that attention and routing are far from uniform: an error in a window, an angle
            # or an expert's weight moves the logits by far more than the tolerance.
            # In a GPT-OSS and in hybrids less: transformers' own fp32 gradients would be 3.5e-5 and 5e-5 from
            # float64.
            std = 0.1 if hasattr(config, "linear_num_key_heads") else 0.3
            parameter.normal_(std=0.15 if config.model_type == "gpt_oss" else std)
            if "norm" in parameter_name and not is_norm_from_zero(config, parameter_name):
                parameter.add_(1.0)
            parameter.copy_(parameter.bfloat16())
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(directory)
    return model.eval()


def experts_apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the matrices of each expert for themselves where a file has [E, 2 width, H] and [E, H, width]."""
    apart = {}
    for name, tensor in tensors.items():
        block, _, which = name.rpartition(".")
        is_stack = block.endswith("mlp.experts") and which in ("gate_up_proj", "down_proj")
        if not is_stack or f"{name}_bias" in tensors:
            apart[name] = tensor
            continue
        names = ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,)
        for expert, whole in enumerate(tensor):
            parts = zip(names, whole.chunk(len(names)), strict=True)
            apart |= {f"{block}.{expert}.{each}.weight": part for each, part in parts}
    return apart


def saved_gradients(model: Any, directory: Path) -> dict[str, Tensor]:
    """The gradients of a backward by the names of files, which the model has no more afterwards.

    Through transformers' own writer: a mixture's experts are one tensor in the model, many in a file.
    """
    from tests.hf_models import read_tensors  # which imports this module

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data, parameter.grad = parameter.grad, parameter.data
        model.save_pretrained(directory)
        for parameter in model.parameters():
            parameter.data, parameter.grad = parameter.grad, None
    return experts_apart(read_tensors(directory))


def is_norm_from_zero(config: Any, name: str) -> bool:
    """Whether a norm multiplies by 1 + weight: a Gemma 3's, and a hybrid's outside gated delta nets."""
    is_hybrid = hasattr(config, "linear_num_key_heads")
    return config.model_type == "gemma3_text" or (is_hybrid and "linear_attn" not in name)


@torch.no_grad()
def transformers_logits(model: Any, tokens: Tensor, lengths: list[int]) -> Tensor:
    """[T, V] fp32 of packed sequences, each run alone."""
    return torch.cat([model(sequence[None]).logits[0].float() for sequence in tokens.split(lengths)])
