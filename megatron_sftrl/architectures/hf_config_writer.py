"""Writes an architecture as the JSON object of a Hugging Face config.json, the inverse of from_hf_config."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sftrl.architectures.architecture import Architecture
from megatron_sftrl.architectures.hf_families import HfFamily, hf_family
from megatron_sftrl.architectures.rope import Rope
from megatron_sftrl.errors import UserError


def hf_config_values(architecture: Architecture, *, dtype: torch.dtype | None) -> dict[str, Any]:
    """The JSON object of a config.json that transformers and vLLM load and from_hf_config reads back.

    The keys are those that transformers 5 writes. Beside them stand the older names (rope_theta,
    rope_scaling, num_experts), equal in value: transformers 4 would otherwise take its own defaults without
    a word. Token ids are null, since an architecture has no tokenizer and the defaults of transformers (1
    and 2 for llama) are those of a particular one; whoever knows the tokenizer writes them over.

    Args:
        architecture: what to describe.
        dtype: of the weights beside it; None leaves the key out.
    Raises:
        UserError: a sliding window in layers for which the family has no key.
    """
    a, line = architecture, hf_family(architecture.family)
    values: dict[str, Any] = {
        "architectures": [line.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "initializer_range": a.init_std,
        "intermediate_size": a.ffn_hidden_size,
        "max_position_embeddings": a.max_position_embeddings,
        "model_type": a.family,
        "num_attention_heads": a.num_attention_heads,
        "num_hidden_layers": a.num_layers,
        "num_key_value_heads": a.num_query_groups,
        "pad_token_id": None,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_embeddings,
        "use_cache": True,
        "vocab_size": a.vocab_size,
        **_rope_values(a.rope),
        **_window_values(a, line),
        **_mixture_values(a, line),
    }
    if a.family in ("llama", "qwen3", "qwen3_moe"):
        values["attention_bias"] = False
    if a.family == "llama":
        values["mlp_bias"] = False
    if dtype is not None:
        values["dtype"] = str(dtype).removeprefix("torch.")
    return dict(sorted(values.items()))


def _rope_values(rope: Rope) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {
            "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
    values: dict[str, Any] = {
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
        "rope_theta": rope.theta,
    }
    if rope.kind != "default":
        values["rope_scaling"] = scaling
    return values


def _window_values(a: Architecture, line: HfFamily) -> dict[str, Any]:
    if line.window != "layers" and len(a.window_layers) not in (0, a.num_layers):
        raise UserError(
            f"window_layers {list(a.window_layers)}: {line.architecture} has a sliding window in all of its "
            f"{a.num_layers} layers or in none; use family qwen2 or qwen3 for a window in some"
        )
    if line.window == "none":
        if a.sliding_window is not None:
            raise UserError(
                f"sliding_window {a.sliding_window}: {line.architecture} has none; use family mistral"
            )
        return {}
    values: dict[str, Any] = {"sliding_window": a.sliding_window}
    if line.window != "always":
        values["use_sliding_window"] = a.sliding_window is not None
    if line.window == "layers":
        in_window = set(a.window_layers)
        values["layer_types"] = [
            "sliding_attention" if layer in in_window else "full_attention" for layer in range(a.num_layers)
        ]
        # Read only by those who do not know layer_types: the first layer from which all have the window.
        values["max_window_layers"] = next(
            (first for first in range(a.num_layers) if in_window >= set(range(first, a.num_layers))),
            a.num_layers,
        )
    return values


def _mixture_values(a: Architecture, line: HfFamily) -> dict[str, Any]:
    if a.mixture is None:
        return {}
    assert line.mixture is not None
    values: dict[str, Any] = {
        "num_experts_per_tok": a.mixture.experts_per_token,
        "num_local_experts": a.mixture.num_experts,
        "output_router_logits": False,
    }
    if a.family == "mixtral":
        if not a.mixture.normalizes_weights:
            raise UserError("normalizes_weights = False: a Mixtral always divides the weights by their sum")
        return {**values, "router_jitter_noise": 0.0}
    return {
        **values,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": a.ffn_hidden_size,
        "norm_topk_prob": a.mixture.normalizes_weights,
        "num_experts": a.mixture.num_experts,
    }
