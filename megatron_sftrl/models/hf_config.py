"""Reads a Hugging Face config.json: each thing it asks for is honoured, or refused by name.

Only JSON is read, transformers is not imported. Absent keys take the defaults of transformers' own
configuration classes (version 5.19), so that both build the same network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import (
    Architecture,
    Latent,
    Mixture,
    divided_head_dim,
    has_qk_norm,
    has_qkv_bias,
)
from megatron_sftrl.models.hf_families import asked_family, hf_family
from megatron_sftrl.models.hf_family import MULTIPLIERS, HfFamily
from megatron_sftrl.models.hf_hybrids import delta_net_values, language_model, read_delta_net
from megatron_sftrl.models.hf_positions import (
    latent_head,
    longest_of,
    read_no_rope_layers,
    read_ropes,
    rope_values,
)
from megatron_sftrl.models.hf_refusals import DROPOUTS, SHARED_WIDTH, refuse_what_is_not_supported
from megatron_sftrl.models.hf_windows import read_window, window_values
from megatron_sftrl.models.json_reader import JsonReader, read_json_object
from megatron_sftrl.models.rope import latent_attention_multiplier

# Of GPT-OSS's gates, where a config.json is silent.
_SLOPE, _LIMIT = 1.702, 7.0
_QUERY_SCALAR = "query_pre_attn_scalar"
_GROUPS = ("n_group", "topk_group")
_OF_EVERY_MODEL = ("activation", "all_biases", "gate_offset", "has_sinks", "norms", "norms_from_zero")
_OF_EVERY_MODEL += ("qk_norm_spans_heads", "scales_embedding")
"""Fields of an Architecture that a family has, whatever a config.json says."""


def is_hugging_face(path: Path) -> bool:
    """Whether a directory is a model of Hugging Face, and no checkpoint or run of ours."""
    return (path / "config.json").is_file() and not (path / "resolved.yaml").exists()


def from_hf_config(path: Path | str, *, text_only: bool = False) -> Architecture:
    """The architecture that a config.json describes; `path` may be its directory.

    Args:
        text_only: of a multimodal model its language model alone is asked for.

    Raises:
        UserError: no such file, not JSON, or every request in it that cannot be honoured.
    """
    return read_hf_config(path, text_only=text_only)[0]


def read_hf_config(path: Path | str, *, text_only: bool = False) -> tuple[Architecture, tuple[str, ...]]:
    """As from_hf_config, and a line on each key that asks for something and yet changes nothing."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    reader = language_model(read_json_object(file), text_only=text_only)
    line = asked_family(reader)
    refuse_what_is_not_supported(reader, line)
    num_layers, hidden_size, heads, vocab_size = (
        reader.whole(key, line.sizes.get(key))
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    )
    groups, latent = _num_query_groups(reader, line, heads), None
    if line.has_latent:
        latent, head_dim = _latent(reader, line, heads=heads, groups=groups)
    else:
        head_dim = _head_dim(reader, line)
    max_positions = reader.whole("max_position_embeddings", line.max_position_embeddings)
    rope, window_rope = read_ropes(reader, line, max_position_embeddings=max_positions)
    if rope.kind == "yarn" and line.family == "mixtral" and head_dim is None:
        reader.problems.append("head_dim is missing: transformers fails on yarn in a Mixtral without it")
    no_rope_layers = read_no_rope_layers(reader, line, num_layers)
    window, window_layers = read_window(
        reader,
        line,
        num_layers=num_layers,
        max_position_embeddings=max_positions,
        no_rope_layers=no_rope_layers,
        has_own_rope=window_rope is not None,
    )
    delta_net = read_delta_net(reader, num_layers) if line.has_delta_net else None
    width = _ffn_hidden_size(reader, line)
    norm_eps = reader.number("rms_norm_eps", line.norm_eps)
    init_std = reader.number("initializer_range", 0.02)
    tie_embeddings = reader.flag("tie_word_embeddings", line.tie_word_embeddings)
    read_mixture = _grouped if line.mixture is not None and line.mixture.has_groups else _mixture_values
    mixture = read_mixture(reader, line, num_layers)
    qkv_bias, qk_norm = _biases_and_norms(reader, line)
    gate = _gate(reader, line)
    multipliers: dict[str, Any] = {
        field: reader.number(key, 1.0) for key, field in MULTIPLIERS.items() if key in line.keys
    }
    if _QUERY_SCALAR in line.keys:
        multipliers["attention_multiplier"] = reader.whole(_QUERY_SCALAR, 256) ** -0.5
    if head_dim is not None and rope.mscale_all_dim:
        multipliers["attention_multiplier"] = latent_attention_multiplier(rope, head_dim)
    reader.raise_problems()
    try:
        architecture = Architecture(
            family=line.family,
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=width,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim or divided_head_dim(hidden_size, heads),
            vocab_size=vocab_size,
            max_position_embeddings=longest_of(rope, max_positions),
            rope=rope,
            sliding_window=window,
            window_layers=window_layers,
            norm_eps=norm_eps,
            tie_embeddings=tie_embeddings,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            mixture=mixture,
            init_std=init_std,
            window_rope=window_rope if window_layers else None,
            no_rope_layers=no_rope_layers,
            latent=latent,
            delta_net=delta_net,
            has_output_gate=line.has_delta_net,
            **{field: getattr(line, field) for field in _OF_EVERY_MODEL},
            **gate,
            **multipliers,
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    return architecture, tuple(f"{file}: {note}" for note in dict.fromkeys(reader.notes))


def _biases_and_norms(reader: JsonReader, line: HfFamily) -> tuple[bool, bool]:
    """Whether q, k and v have biases, and whether q and k are normalised."""
    qkv_bias, qk_norm = has_qkv_bias(line.family), has_qk_norm(line.family)
    if line.bias_key is not None:
        qkv_bias = reader.flag(line.bias_key, qkv_bias)
    if line.qk_norm_key is not None:
        qk_norm = reader.flag(line.qk_norm_key, qk_norm)
    if line.all_biases and not reader.flag("attention_bias", default=True):
        reader.say("attention_bias", f" False: {line.architecture} is only built with all of its biases")
    return qkv_bias, qk_norm


def _gate(reader: JsonReader, line: HfFamily) -> dict[str, Any]:
    """Of the MLP, where a file can say it."""
    if "swiglu_limit" not in line.keys:
        return {}
    return {
        "gate_slope": reader.number("swiglu_alpha", _SLOPE),
        "gate_limit": reader.number("swiglu_limit", _LIMIT),
    }


def _num_query_groups(reader: JsonReader, line: HfFamily, heads: int) -> int:
    key = "num_key_value_heads"
    if line.null_key_value_heads and reader.has(key) and reader.get(key) is None:
        return heads
    return reader.whole(key, line.num_key_value_heads or heads)


def _head_dim(reader: JsonReader, line: HfFamily) -> int | None:
    """None for hidden_size / num_attention_heads."""
    if not reader.has("head_dim"):
        return line.head_dim
    if reader.get("head_dim") is None and line.null_head_dim:
        return None
    return reader.whole("head_dim", 1)


def _latent(reader: JsonReader, line: HfFamily, *, heads: int, groups: int) -> tuple[Latent, int]:
    """Latent attention and the width of its queries' and keys' heads; problems are added to the reader."""
    rope_dim, still = latent_head(reader, line)
    head_dim = rope_dim if line.latent_head_dim == "turning" else still + rope_dim
    for key, built in (("head_dim", head_dim), ("qk_head_dim", still + rope_dim)):
        if reader.has(key) and reader.get(key) != built:
            reader.say(
                key, f" {reader.get(key)!r} contradicts qk_rope_head_dim and qk_nope_head_dim: {built}"
            )
    if groups != heads:
        reader.say("num_key_value_heads", f" {groups}: only num_attention_heads = {heads} is supported")
    if not reader.flag("rope_interleave", default=True):
        reader.say("rope_interleave", " False: vLLM turns neighbours together all the same")
    if reader.get("rms_norm_eps") not in (None, 1e-6):
        reader.note(
            "rms_norm_eps", ": the norms inside latent attention have 1e-6 in transformers, this in vLLM"
        )
    has_query_rank = not reader.has("q_lora_rank") or reader.get("q_lora_rank") is not None
    latent = Latent(
        query_rank=reader.whole("q_lora_rank", line.sizes["q_lora_rank"]) if has_query_rank else None,
        rank=reader.whole("kv_lora_rank", line.sizes["kv_lora_rank"]),
        rope_dim=rope_dim,
        value_dim=reader.whole("v_head_dim", 128),
    )
    return latent, still + rope_dim


def _ffn_hidden_size(reader: JsonReader, line: HfFamily) -> int:
    if line.mixture is None:
        return reader.whole("intermediate_size", line.sizes.get("intermediate_size"))
    return reader.whole(line.mixture.width_key, line.mixture.width)


def _mixture_values(reader: JsonReader, line: HfFamily, _: int) -> Mixture | None:
    """The experts; problems are added to the reader."""
    if line.mixture is None:
        return None
    # transformers 5 writes num_local_experts for both families and reads both names.
    counts = {
        reader.whole(key, line.mixture.num_experts)
        for key in ("num_experts", "num_local_experts")
        if reader.has(key)
    }
    if len(counts) > 1:
        reader.problems.append("num_experts and num_local_experts contradict each other")
    per_token = reader.whole("num_experts_per_tok", line.mixture.experts_per_token)
    normalizes = (
        True
        if "norm_topk_prob" in line.refuses
        else reader.flag("norm_topk_prob", line.mixture.normalizes_weights)
    )
    num_experts = min(counts, default=line.mixture.num_experts)
    shared_width = 0
    if line.mixture.shared_width is not None:
        shared_width = reader.whole(SHARED_WIDTH, line.mixture.shared_width)
    try:
        return Mixture(
            num_experts=num_experts,
            experts_per_token=per_token,
            normalizes_weights=normalizes,
            shared_width=shared_width,
            routing=line.mixture.routing,
        )
    except ValueError as error:
        reader.problems.append(str(error))
        return None


def _grouped(reader: JsonReader, line: HfFamily, num_layers: int) -> Mixture | None:
    """The experts under DeepSeek-V3's keys; problems are added to the reader."""
    assert line.mixture is not None
    normalizes, is_sigmoid = reader.flag("norm_topk_prob", default=True), line.mixture.routing == "sigmoid"
    if is_sigmoid and not normalizes:
        reader.say("norm_topk_prob", " False: a sigmoid router's weights are always normalised here")
    if not is_sigmoid and (asked := [reader.values.get(key, 1) for key in _GROUPS]) != [1, 1]:
        reader.say(_GROUPS[0], f", {_GROUPS[1]} {asked}: groups are only built behind a sigmoid router")
    width = reader.whole(line.mixture.width_key, line.mixture.width)
    dense_layers = _count(reader, "first_k_dense_replace", line.mixture.num_dense_layers)
    num_shared = _count(reader, "n_shared_experts", 1)
    if num_shared == 0:
        reader.say("n_shared_experts", " 0: expected at least one")
    try:
        return Mixture(
            num_experts=reader.whole("n_routed_experts", line.mixture.num_experts),
            experts_per_token=reader.whole("num_experts_per_tok", line.mixture.experts_per_token),
            normalizes_weights=normalizes,
            shared_width=width * num_shared,
            shared_is_gated=False,
            routing=line.mixture.routing,
            num_groups=reader.whole(_GROUPS[0], line.mixture.num_groups) if is_sigmoid else 1,
            groups_per_token=reader.whole(_GROUPS[1], line.mixture.groups_per_token) if is_sigmoid else 1,
            weights_factor=reader.number("routed_scaling_factor", line.mixture.weights_factor),
            num_dense_layers=min(dense_layers, num_layers),
            dense_width=reader.whole("intermediate_size") if dense_layers else 0,
        )
    except ValueError as error:
        reader.problems.append(str(error))
        return None


def _count(reader: JsonReader, key: str, default: int) -> int:
    """A whole number that may be 0."""
    return 0 if reader.values.get(key, default) == 0 else reader.whole(key, default)


# Writes an architecture as the JSON object of a Hugging Face config.json, the inverse of from_hf_config.


def hf_config_values(architecture: Architecture, *, dtype: torch.dtype | None) -> dict[str, Any]:
    """The JSON object of a config.json that transformers and vLLM load and from_hf_config reads back.

    The keys are those that transformers 5 writes. Beside them stand the older names (rope_theta,
    rope_scaling, num_experts), equal in value: transformers 4 would otherwise take its own defaults without a
    word. Token ids are null, since an architecture has no tokenizer and the defaults of transformers (1 and 2
    for llama) are those of a particular one; a caller that knows the tokenizer writes them over.

    Args:
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
        "head_dim": a.head_dim if line.latent_head_dim == "all" else a.rope_head_dim,
        line.activation_key: a.activation,
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
        **rope_values(a, line),
        **window_values(a, line),
        **_keys_of_mixture(a, line),
        **{key: getattr(a, field) for key, field in MULTIPLIERS.items() if key in line.keys},
        **(_keys_of_latent(a, a.latent) if a.latent else {}),
        **line.for_vllm,
        **dict.fromkeys(line.states, False),
        **dict.fromkeys(line.keys & DROPOUTS, 0.0),
        **({_QUERY_SCALAR: _query_scalar(a)} if _QUERY_SCALAR in line.keys else {}),
        **({"swiglu_alpha": a.gate_slope, "swiglu_limit": a.gate_limit} if a.gate_limit else {}),
        **({"attention_bias": True} if a.all_biases else {}),
        **dict.fromkeys(line.draft_keys[-1:], 0),
        **(delta_net_values(a) if line.has_delta_net else {}),
    }
    if line.bias_key is not None:
        values[line.bias_key] = a.qkv_bias
    if line.qk_norm_key is not None:
        values[line.qk_norm_key] = a.qk_norm
    if dtype is not None:
        values["dtype"] = str(dtype).removeprefix("torch.")
    return dict(sorted(values.items()))


def _query_scalar(a: Architecture) -> int:
    """Of a Gemma 3: queries times keys are divided by its root."""
    multiplier = a.attention_multiplier or a.head_dim**-0.5
    scalar = round(multiplier**-2)
    if scalar < 1 or scalar**-0.5 != multiplier:
        raise UserError(
            f"attention_multiplier = {multiplier}: {_QUERY_SCALAR} is a whole number, and no one has "
            "this as 1 / its root"
        )
    return scalar


def _keys_of_latent(a: Architecture, latent: Latent) -> dict[str, Any]:
    return {
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank,
        "qk_head_dim": a.head_dim,
        "qk_nope_head_dim": a.head_dim - latent.rope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "rope_interleave": True,
        "v_head_dim": latent.value_dim,
    }


def _keys_of_mixture(a: Architecture, line: HfFamily) -> dict[str, Any]:
    if a.mixture is None:
        return {}
    assert line.mixture is not None
    if line.mixture.has_groups:
        return _keys_of_grouped(a, a.mixture)
    values: dict[str, Any] = {
        "num_experts_per_tok": a.mixture.experts_per_token,
        "output_router_logits": False,
    }
    if "num_local_experts" not in line.refuses:
        values["num_local_experts"] = a.mixture.num_experts
    if "norm_topk_prob" in line.refuses:
        if not a.mixture.normalizes_weights:
            raise UserError(
                f"normalizes_weights = False: a {a.family.title()} always divides the weights by their sum"
            )
        has_jitter = a.family in ("mixtral", "minimax_m2")
        return values | ({"router_jitter_noise": 0.0} if has_jitter else {})
    return {
        **values,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": a.ffn_hidden_size,
        "norm_topk_prob": a.mixture.normalizes_weights,
        "num_experts": a.mixture.num_experts,
        **({SHARED_WIDTH: a.mixture.shared_width} if line.mixture.shared_width is not None else {}),
    }


def _keys_of_grouped(a: Architecture, mixture: Mixture) -> dict[str, Any]:
    return {
        "first_k_dense_replace": mixture.num_dense_layers,
        "intermediate_size": mixture.dense_width or a.ffn_hidden_size,
        "moe_intermediate_size": a.ffn_hidden_size,
        _GROUPS[0]: mixture.num_groups,
        "n_routed_experts": mixture.num_experts,
        "n_shared_experts": mixture.shared_width // a.ffn_hidden_size,
        "norm_topk_prob": mixture.normalizes_weights,
        "num_experts_per_tok": mixture.experts_per_token,
        "output_router_logits": False,
        "routed_scaling_factor": mixture.weights_factor,
        _GROUPS[1]: mixture.groups_per_token,
    }
