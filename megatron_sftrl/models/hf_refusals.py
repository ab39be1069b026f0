"""What a config.json asks for and is not built: each is refused by name, in the reader's problems.

Keys that nobody reads here are judged, too: what another reader of the file obeys is refused, of the rest it
is said that it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sftrl.models.architecture import has_qk_norm, has_qkv_bias
from megatron_sftrl.models.hf_family import HfFamily
from megatron_sftrl.models.hf_hybrids import DELTA_KEYS
from megatron_sftrl.models.json_reader import JsonReader, shown

_READ_KEYS = frozenset(
    {
        "architectures",
        "attention_bias",
        "attention_dropout",
        "attn_logit_softcapping",
        "auto_map",
        "final_logit_softcapping",
        "head_dim",
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

# DeepSeek-V3's.
_GROUPED_KEYS = frozenset(
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

SHARED_WIDTH = "shared_expert_intermediate_size"
DROPOUTS = frozenset({"embd_pdrop", "resid_pdrop"})

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


def refuse_what_is_not_supported(reader: JsonReader, line: HfFamily) -> None:
    """Add to the reader's problems whatever this family cannot honour, and a note on what changes nothing."""
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
    activation = reader.values.get(line.activation_key, line.activation)
    if activation != line.activation:
        say(f"{line.activation_key} {activation!r}: only {line.activation} is supported")
    # Qwen2 does not read attention_bias: its q, k and v always carry biases and its output never does.
    has_bias = has_qkv_bias(line.family) or line.bias_key == "attention_bias"
    if reader.get("attention_bias") and not has_bias:
        say("attention_bias: biases on all four projections are not supported")
    if reader.get("mlp_bias"):
        say("mlp_bias: biases in the MLP are not supported")
    for key in ("attention_dropout", *sorted(line.keys & DROPOUTS)):
        if reader.get(key):
            say(f"{key} {reader.get(key)}: dropout is not supported, set 0.0")
    for key, reason in line.refuses.items():
        if reader.has(key):
            reader.say(key, f": {reason}")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if reader.get(key) is not None:
            say(f"{key} {reader.get(key)!r}: a soft-cap on logits is not supported")
    known = _READ_KEYS | _KEYS_WITHOUT_EFFECT | line.keys | line.refuses.keys() | {line.activation_key}
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
    if line.mixture is not None and line.mixture.has_groups:
        known |= _GROUPED_KEYS
    elif line.mixture is not None:
        known |= _MIXTURE_KEYS | ({SHARED_WIDTH} if line.mixture.shared_width is not None else set())
        _refuse_other_mixtures(reader, line)
    _judge_other_keys(reader, line, reader.values.keys() - known)


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
    # A null there is a factor for each matrix; without the key each reader assumes something else.
    has_scales = has_blocks or ("weight_block_size" in values and block is None)
    has_values = values.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")
    is_fp8 = method == "fp8" and has_values and has_scales
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


# Keys of a config.json that the network's own class in transformers does not define.
#
# They cannot change what transformers computes. Those that another reader of the file obeys are refused,
# since the trainer and a rollout engine would be different networks; of all others it is said that they do
# nothing.


_NETWORK = "vLLM builds another network with it, transformers does not"
_ATTENTION = "it changes which positions are attended to"
_NESTED = "it holds the configuration of another model, whose sizes are not read here"
_QUANTISED = "quantised weights cannot be trained; use the unquantised model"
_MIXTURE = "only the experts of the supported mixtures are built, and each by its own keys"
_ROPE = "give the positions as rope_theta and rope_parameters"

_OBEYED_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("bias", "qkv_bias", "qk_norm", "logit_scale", "ada_rms_norm_t_cond"), _NETWORK),
    **dict.fromkeys(("head_dtype", "hidden_size_per_head", "n_head_kv", "num_kv_heads"), _NETWORK),
    **dict.fromkeys(("block_configs", "per_layer_config", "is_heterogeneous", "layers_block_type"), _NETWORK),
    **dict.fromkeys(("attribute_map", "fusion_config", "target_layer_count", "canvas_length"), _NETWORK),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"), _NETWORK),
    **dict.fromkeys(("attention_sinks", "layer_rope_theta", "llama_4_scaling"), _NETWORK),
    **dict.fromkeys(("layer_scale", "output_gate_type"), _NETWORK),
    **dict.fromkeys(("is_causal", "use_bidirectional_attention", "attention_chunk_size"), _ATTENTION),
    **dict.fromkeys(("dual_chunk_attention_config", "use_dual_chunk_attention"), _ATTENTION),
    **dict.fromkeys(("sparse_attention_config", "rswa_window", "index_topk", "attn_type_list"), _ATTENTION),
    **dict.fromkeys(("text_config", "decoder", "generator", "text_encoder"), _NESTED),
    **dict.fromkeys(("thinker_config", "llm_config", "language_config"), _NESTED),
    **dict.fromkeys(("compression_config", "quantization"), _QUANTISED),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "moe_num_experts"), _MIXTURE),
    **dict.fromkeys(("moe_intermediate_size", "n_routed_experts", "n_shared_experts"), _MIXTURE),
    **dict.fromkeys(("shared_expert_intermediate_size",), _MIXTURE),
    **dict.fromkeys(("rotary_emb_base", "rotary_pct", "rotary_emb_fraction", "default_rope_type"), _ROPE),
    **dict.fromkeys(("mrope_section", "xdrope_section"), _ROPE),
}
"""By key, why it is refused."""


def _judge_other_keys(reader: JsonReader, line: HfFamily, keys: set[str]) -> None:
    """Refuse `keys`, not read here, that another reader obeys and note the rest; both in the reader."""
    for key in sorted(keys):
        value = reader.get(key)
        if key in _OBEYED_ELSEWHERE and not _states_what_is_built(reader, line, key):
            # null, false, 0 and empty ask for nothing, except where the default is true.
            if value or (key == "is_causal" and value is not None):
                reader.say(key, f" {shown(value)}: {_OBEYED_ELSEWHERE[key]}")
        elif value:
            reader.note(key, f": {line.architecture} of transformers does not read it; it changes no number")


def _states_what_is_built(reader: JsonReader, line: HfFamily, key: str) -> bool:
    """The value is the one that the network has without the key."""
    built = {
        "qkv_bias": has_qkv_bias(line.family),
        "qk_norm": has_qk_norm(line.family),
        "is_causal": True,
        "logit_scale": 1.0,
        "rotary_pct": 1.0,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_base": reader.get("rope_theta"),
        "num_kv_heads": reader.get("num_key_value_heads"),
        "n_head_kv": reader.get("num_key_value_heads"),
        "head_dtype": "model",
        "default_rope_type": "default",
    }
    value = reader.get(key)
    if key == "output_gate_type":
        return value in ("silu", "swish")
    if key == "attn_type_list":  # a MiniMax's: 1 is a layer that attends to all
        return isinstance(value, list) and all(kind == 1 for kind in value)
    return key in built and value is not None and value == built[key]
