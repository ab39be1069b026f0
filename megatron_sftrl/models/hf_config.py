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
    latent_attention_multiplier,
)
from megatron_sftrl.models.hf_families import MULTIPLIERS, HfFamily, asked_family, hf_family, judge_other_keys
from megatron_sftrl.models.hf_hybrids import DELTA_KEYS, delta_net_values, language_model, read_delta_net
from megatron_sftrl.models.hf_positions import (
    read_no_rope_layers,
    read_ropes,
    read_window,
    rope_values,
    window_values,
)
from megatron_sftrl.models.json_reader import JsonReader, read_json_object, shown

_READ_KEYS = frozenset(
    {
        "architectures",
        "attention_bias",
        "attention_dropout",
        "attn_logit_softcapping",
        "auto_map",
        "final_logit_softcapping",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "is_encoder_decoder",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    }
)

# output_router_logits and router_aux_loss_coef add a term to the loss that transformers itself computes.
_MIXTURE_KEYS = frozenset(
    {
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    }
)

# Of a sigmoid router and what comes with it.
_SIGMOID_KEYS = frozenset(
    {
        "first_k_dense_replace",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts_per_tok",
        "output_router_logits",
        "routed_scaling_factor",
        "router_aux_loss_coef",
        "topk_group",
    }
)
_LATENT_KEYS = frozenset(
    {
        "kv_lora_rank",
        "q_lora_rank",
        "qk_head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "rope_interleave",
        "v_head_dim",
    }
)
# Of GPT-OSS's gates, where a config.json is silent.
_SLOPE, _LIMIT = 1.702, 7.0

_SHARED = "shared_expert_intermediate_size"
_DROPOUTS = frozenset({"embd_pdrop", "resid_pdrop"})

# They concern storage, generation, labels or caches, never the logits of a forward with the full context;
# pretraining_tp only split the same products into slices.
_KEYS_WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path attn_implementation
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    experts_implementation exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label label2id length_penalty max_length min_length
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version transformers_weights typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


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
    _refuse_what_is_not_supported(reader, line)
    num_layers, hidden_size = reader.whole("num_hidden_layers"), reader.whole("hidden_size")
    heads, vocab_size = reader.whole("num_attention_heads"), reader.whole("vocab_size")
    groups, latent = _num_query_groups(reader, line, heads), None
    if line.has_latent:
        latent, head_dim = _latent(reader, heads=heads, groups=groups)
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
    )
    delta_net = read_delta_net(reader, num_layers) if line.has_delta_net else None
    width = _ffn_hidden_size(reader, line)
    norm_eps = reader.number("rms_norm_eps", line.norm_eps)
    init_std = reader.number("initializer_range", 0.02)
    tie_embeddings = reader.flag("tie_word_embeddings", line.tie_word_embeddings)
    read_mixture = _mixture_values if line.mixture is None or line.mixture.routing == "softmax" else _sigmoid
    mixture = read_mixture(reader, line, num_layers)
    qkv_bias, qk_norm = _biases_and_norms(reader, line)
    gate = _gate(reader, line)
    multipliers = {field: reader.number(key, 1.0) for key, field in MULTIPLIERS.items() if key in line.keys}
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
            max_position_embeddings=max_positions,
            rope=rope,
            sliding_window=window,
            window_layers=window_layers,
            norm_eps=norm_eps,
            tie_embeddings=tie_embeddings,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            mixture=mixture,
            init_std=init_std,
            norms=line.norms,
            qk_norm_spans_heads=line.qk_norm_spans_heads,
            window_rope=window_rope,
            no_rope_layers=no_rope_layers,
            latent=latent,
            has_sinks=line.has_sinks,
            all_biases=line.all_biases,
            gate_offset=line.gate_offset,
            delta_net=delta_net,
            has_output_gate=line.has_delta_net,
            norms_from_zero=line.has_delta_net,
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


def _gate(reader: JsonReader, line: HfFamily) -> dict[str, float]:
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


def _latent(reader: JsonReader, *, heads: int, groups: int) -> tuple[Latent, int]:
    """Latent attention and the width of its queries' and keys' heads; problems are added to the reader."""
    rope_dim, still = reader.whole("qk_rope_head_dim", 64), reader.whole("qk_nope_head_dim", 128)
    for key, built in (("head_dim", rope_dim), ("qk_head_dim", still + rope_dim)):
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
        query_rank=reader.whole("q_lora_rank", 1536) if has_query_rank else None,
        rank=reader.whole("kv_lora_rank", 512),
        rope_dim=rope_dim,
        value_dim=reader.whole("v_head_dim", 128),
    )
    return latent, still + rope_dim


def _ffn_hidden_size(reader: JsonReader, line: HfFamily) -> int:
    if line.mixture is None:
        return reader.whole("intermediate_size")
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
        shared_width = reader.whole(_SHARED, line.mixture.shared_width)
    try:
        return Mixture(
            num_experts=num_experts,
            experts_per_token=per_token,
            normalizes_weights=normalizes,
            shared_width=shared_width,
        )
    except ValueError as error:
        reader.problems.append(str(error))
        return None


def _sigmoid(reader: JsonReader, line: HfFamily, num_layers: int) -> Mixture | None:
    """The experts behind a sigmoid router; problems are added to the reader."""
    assert line.mixture is not None
    if not reader.flag("norm_topk_prob", default=True):
        reader.say("norm_topk_prob", " False: a sigmoid router's weights are always normalised here")
    width = reader.whole(line.mixture.width_key, line.mixture.width)
    dense_layers = _count(reader, "first_k_dense_replace", line.mixture.num_dense_layers)
    num_shared = _count(reader, "n_shared_experts", 1)
    if num_shared == 0:
        reader.say("n_shared_experts", " 0: expected at least one")
    try:
        return Mixture(
            num_experts=reader.whole("n_routed_experts", line.mixture.num_experts),
            experts_per_token=reader.whole("num_experts_per_tok", line.mixture.experts_per_token),
            normalizes_weights=True,
            shared_width=width * num_shared,
            shared_is_gated=False,
            routing="sigmoid",
            num_groups=reader.whole("n_group", line.mixture.num_groups),
            groups_per_token=reader.whole("topk_group", line.mixture.groups_per_token),
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


def _refuse_what_is_not_supported(reader: JsonReader, line: HfFamily) -> None:
    say = reader.problems.append
    if reader.get("auto_map") and line.has_code:
        reader.note(
            "auto_map", f": transformers' own {line.architecture} is meant; the model's code never runs"
        )
    elif reader.get("auto_map"):
        say("auto_map asks for code that comes with the model: remote code is never run")
    _judge_quantisation(reader, line)
    if reader.get("is_encoder_decoder"):
        say("is_encoder_decoder: only decoder-only models are supported")
    activation = reader.values.get("hidden_act", "silu")
    if activation != "silu":
        say(f"hidden_act {activation!r}: only silu (SwiGLU) is supported")
    # Qwen2 does not read attention_bias: its q, k and v always carry biases and its output never does.
    has_bias = has_qkv_bias(line.family) or line.bias_key == "attention_bias"
    if reader.get("attention_bias") and not has_bias:
        say("attention_bias: biases on all four projections are not supported")
    if reader.get("mlp_bias"):
        say("mlp_bias: biases in the MLP are not supported")
    for key in ("attention_dropout", *sorted(line.keys & _DROPOUTS)):
        if reader.get(key):
            say(f"{key} {reader.get(key)}: dropout is not supported, set 0.0")
    for key, reason in line.refuses.items():
        if reader.has(key):
            reader.say(key, f": {reason}")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if reader.get(key) is not None:
            say(f"{key} {reader.get(key)!r}: a soft-cap on logits is not supported")
    known = _READ_KEYS | _KEYS_WITHOUT_EFFECT | line.keys | line.refuses.keys()
    known |= {key for key in (line.bias_key, line.qk_norm_key) if key} | line.for_vllm.keys()
    known |= _LATENT_KEYS if line.has_latent else frozenset()
    known |= DELTA_KEYS if line.has_delta_net else frozenset()
    for key, built in line.for_vllm.items():
        if reader.has(key) and reader.get(key) != built:
            reader.say(key, f" {reader.get(key)!r}: only {built!r} is supported")
    if line.draft_keys:
        known |= {*line.draft_keys}
        if count := max(reader.get(key) or 0 for key in line.draft_keys):
            reader.note(
                line.draft_keys[-1], f" {count}: layers that draft tokens are left out, also of exports"
            )
    if line.mixture is not None and line.mixture.routing == "sigmoid":
        known |= _SIGMOID_KEYS
    elif line.mixture is not None:
        known |= _MIXTURE_KEYS | ({_SHARED} if line.mixture.shared_width is not None else set())
        _refuse_other_mixtures(reader, line)
    judge_other_keys(reader, line, reader.values.keys() - known)


def _judge_quantisation(reader: JsonReader, line: HfFamily) -> None:
    """Weights that are dequantised while they are read are welcome."""
    key = "quantization_config"
    asked = reader.get(key)
    if not asked:
        return
    values = asked if isinstance(asked, dict) else {}
    method, block = values.get("quant_method"), values.get("weight_block_size")
    has_blocks = (
        isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block)
    )
    is_fp8 = method == "fp8" and values.get("fmt", "e4m3") == "e4m3" and has_blocks
    if is_fp8 or (method is not None and method == line.quantised):
        reader.note(key, ": the weights are dequantised while they are read, and exported so")
        return
    known = "fp8 (e4m3) with weight_block_size" + (f" or {line.quantised}" if line.quantised else "")
    reader.say(
        key,
        f" ({method or shown(asked)}): quantised weights cannot be trained, and only quant_method {known} is "
        "dequantised; use the unquantised model",
    )


def _refuse_other_mixtures(reader: JsonReader, line: HfFamily) -> None:
    if reader.get("mlp_only_layers"):
        reader.say("mlp_only_layers", f" {reader.get('mlp_only_layers')!r}: only a mixture in every layer")
    if reader.values.get("decoder_sparse_step", 1) != 1:
        reader.say(
            "decoder_sparse_step", f" {reader.get('decoder_sparse_step')!r}: only 1, a mixture in every layer"
        )
    if reader.get("router_jitter_noise"):
        reader.say("router_jitter_noise", f" {reader.get('router_jitter_noise')!r}: not supported, set 0.0")


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
        "head_dim": a.rope_head_dim,
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
        **rope_values(a, line),
        **window_values(a, line),
        **_keys_of_mixture(a, line),
        **{key: getattr(a, field) for key, field in MULTIPLIERS.items() if key in line.keys},
        **(_keys_of_latent(a, a.latent) if a.latent else {}),
        **line.for_vllm,
        **dict.fromkeys(line.states, False),
        **dict.fromkeys(line.keys & _DROPOUTS, 0.0),
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
    if line.mixture.routing == "sigmoid":
        return _keys_of_sigmoid(a, a.mixture)
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
        return values | ({"router_jitter_noise": 0.0} if a.family == "mixtral" else {})
    return {
        **values,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": a.ffn_hidden_size,
        "norm_topk_prob": a.mixture.normalizes_weights,
        "num_experts": a.mixture.num_experts,
        **({_SHARED: a.mixture.shared_width} if line.mixture.shared_width is not None else {}),
    }


def _keys_of_sigmoid(a: Architecture, mixture: Mixture) -> dict[str, Any]:
    return {
        "first_k_dense_replace": mixture.num_dense_layers,
        "intermediate_size": mixture.dense_width or a.ffn_hidden_size,
        "moe_intermediate_size": a.ffn_hidden_size,
        "n_group": mixture.num_groups,
        "n_routed_experts": mixture.num_experts,
        "n_shared_experts": mixture.shared_width // a.ffn_hidden_size,
        "norm_topk_prob": True,
        "num_experts_per_tok": mixture.experts_per_token,
        "output_router_logits": False,
        "routed_scaling_factor": mixture.weights_factor,
        "topk_group": mixture.groups_per_token,
    }
