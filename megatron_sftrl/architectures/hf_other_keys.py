"""Keys of a config.json that the network's own class in transformers does not define.

They cannot change what transformers computes. Those that another reader of the file obeys are refused, since
the trainer and a rollout engine would be different networks; of all others it is said that they do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sftrl.architectures.architecture import has_qk_norm, has_qkv_bias
from megatron_sftrl.architectures.hf_families import HfFamily
from megatron_sftrl.architectures.json_reader import JsonReader, shown

_NETWORK = "vLLM builds another network with it, transformers does not"
_ATTENTION = "it changes which positions are attended to"
_NESTED = "it holds the configuration of another model, whose sizes are not read here"
_QUANTISED = "quantised weights cannot be trained; use the unquantised model"
_MIXTURE = "only the experts of MixtralForCausalLM and Qwen3MoeForCausalLM are supported"
_ROPE = "give the positions as rope_theta and rope_parameters"

_OBEYED_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("bias", "qkv_bias", "qk_norm", "logit_scale", "ada_rms_norm_t_cond"), _NETWORK),
    **dict.fromkeys(("head_dtype", "hidden_size_per_head", "n_head_kv", "num_kv_heads"), _NETWORK),
    **dict.fromkeys(("block_configs", "per_layer_config", "is_heterogeneous", "layers_block_type"), _NETWORK),
    **dict.fromkeys(("attribute_map", "fusion_config", "target_layer_count", "canvas_length"), _NETWORK),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"), _NETWORK),
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


def judge_other_keys(reader: JsonReader, line: HfFamily, keys: set[str]) -> None:
    """Refuse what another reader obeys and note the rest; problems and notes are added to the reader.

    Args:
        reader: of the whole config.json.
        line: the family that it names.
        keys: those of its keys that are not read here.
    """
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
    return key in built and value is not None and value == built[key]
