"""The supported Hugging Face architectures, and what transformers 5 assumes where config.json is silent."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Family
from megatron_sftrl.models.hf_family import MULTIPLIERS, HfFamily
from megatron_sftrl.models.hf_mixtures import MIXTURES
from megatron_sftrl.models.json_reader import JsonReader

_DENSE: tuple[HfFamily, ...] = (
    HfFamily(
        family="llama",
        architecture="LlamaForCausalLM",
        null_key_value_heads=True,
        max_position_embeddings=2048,
        window="none",
        states=("attention_bias", "mlp_bias"),
    ),
    HfFamily(
        family="mistral",
        architecture="MistralForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131072,
        window="always",
        sliding_window=4096,
        refuses={"layer_types": "transformers builds a Ministral, not a Mistral, with it; remove it"},
    ),
    HfFamily(
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        num_key_value_heads=32,
        null_key_value_heads=True,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="layers",
        sliding_window=4096,
    ),
    HfFamily(
        family="qwen3",
        architecture="Qwen3ForCausalLM",
        num_key_value_heads=32,
        null_key_value_heads=True,
        head_dim=128,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="layers",
        sliding_window=4096,
        states=("attention_bias",),
    ),
    HfFamily(
        family="smollm3",
        architecture="SmolLM3ForCausalLM",
        num_key_value_heads=4,
        null_key_value_heads=True,
        null_head_dim=False,
        max_position_embeddings=32768,
        rope_theta=2000000.0,
        tie_word_embeddings=True,
        window="layers",
        no_rope_every=4,
        keys=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        states=("attention_bias", "mlp_bias"),
    ),
    HfFamily(
        family="olmo2",
        architecture="Olmo2ForCausalLM",
        null_key_value_heads=True,
        null_head_dim=False,
        max_position_embeddings=2048,
        norm_eps=1e-5,
        window="none",
        norms="behind",
        qk_norm_spans_heads=True,
        states=("attention_bias",),
    ),
    HfFamily(
        family="olmo3",
        architecture="Olmo3ForCausalLM",
        null_key_value_heads=True,
        null_head_dim=False,
        max_position_embeddings=2048,
        norm_eps=1e-5,
        rope_theta=500000.0,
        window="pattern",
        sliding_window=4096,
        full_every=4,
        norms="behind",
        qk_norm_spans_heads=True,
        rope_by_layer_type=True,
        states=("attention_bias",),
        refuses={"original_max_position_embeddings": "transformers reads it inside rope_parameters alone"},
    ),
    HfFamily(
        family="granite",
        architecture="GraniteForCausalLM",
        null_key_value_heads=True,
        null_head_dim=False,
        max_position_embeddings=2048,
        window="none",
        keys=frozenset(MULTIPLIERS),
        states=("attention_bias", "mlp_bias"),
        refuses={"layer_types": "vLLM builds attention sinks with it, transformers does not; remove it"},
    ),
    HfFamily(
        family="phi3",
        architecture="Phi3ForCausalLM",
        null_key_value_heads=True,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        window="always",
        fused=frozenset({"qkv", "gate_up"}),
        has_code=True,
        rope_kinds=("default", "longrope"),
        partial_rotary=1.0,
        keys=frozenset({"embd_pdrop", "resid_pdrop", "original_max_position_embeddings"}),
        refuses={"layer_types": "Phi3ForCausalLM does not read it and vLLM does, remove it"},
    ),
    HfFamily(
        family="ministral3",
        architecture="Ministral3ForCausalLM",
        num_key_value_heads=8,
        null_key_value_heads=True,
        head_dim=128,
        max_position_embeddings=262144,
        norm_eps=1e-5,
        window="always",
        rope_kinds=("yarn",),
        rope={
            "type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        keys=frozenset({"llama_4_scaling"}),
        refuses={"layer_types": "Ministral3ForCausalLM does not read it and vLLM does, remove it"},
    ),
    HfFamily(
        family="glm4",
        architecture="Glm4ForCausalLM",
        num_key_value_heads=2,
        head_dim=128,
        null_head_dim=False,
        max_position_embeddings=131072,
        norm_eps=0.00000015625,
        window="none",
        norms="both",
        fused=frozenset({"gate_up"}),
        bias_key="attention_bias",
        rope_kinds=("default",),
        partial_rotary=0.5,
        interleaved=True,
    ),
    HfFamily(
        family="gemma3_text",
        architecture="Gemma3ForCausalLM",
        num_key_value_heads=4,
        head_dim=256,
        null_head_dim=False,
        max_position_embeddings=131072,
        rope_theta=1e6,
        tie_word_embeddings=True,
        sizes={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
        },
        window="pattern",
        sliding_window=4096,
        full_every=6,
        full_every_key="sliding_window_pattern",
        norms="both",
        norms_from_zero=True,
        scales_embedding=True,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        rope_kinds=("default", "linear"),
        rope_by_layer_type=True,
        window_theta=1e4,
        keys=frozenset(
            {
                "_sliding_window_pattern",
                "query_pre_attn_scalar",
                "rope_local_base_freq",
                "sliding_window_pattern",
            }
        ),
        states=("attention_bias", "use_bidirectional_attention"),
    ),
    HfFamily(
        family="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        num_key_value_heads=4,
        head_dim=256,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="none",
        norms_from_zero=True,
        has_delta_net=True,
        draft_keys=("mtp_num_hidden_layers",),
        rope_kinds=("default",),
        rope_ignores=frozenset({"mrope_interleaved", "mrope_section"}),
        partial_rotary=0.25,
        states=("attention_bias",),
        for_vllm={"attn_output_gate": True},
    ),
)

HF_FAMILIES = (*_DENSE, *MIXTURES)


def hf_family(family: Family) -> HfFamily:
    return next(line for line in HF_FAMILIES if line.family == family)


# Published under a name of their own that transformers (5.19) does not know without the model's own code.
_OTHER_NAMES: Mapping[object, Family] = {"kimi_k2": "deepseek_v3"}


def asked_family(reader: JsonReader) -> HfFamily:
    """The family that `architectures`, or without it `model_type`, names.

    Raises:
        UserError: none, several, or one that is not supported.
    """
    asked, model_type = reader.get("architectures"), reader.get("model_type")
    names = asked if isinstance(asked, list) else []
    if model_type in _OTHER_NAMES:
        reader.note(
            "model_type", f" {model_type!r}: the network of a {_OTHER_NAMES[model_type]}, also in exports"
        )
        model_type = _OTHER_NAMES[model_type]
    if asked is None:
        chosen = [line for line in HF_FAMILIES if line.family == model_type]
    else:
        chosen = [line for line in HF_FAMILIES if names == [line.architecture]]
    if not chosen:
        raise UserError(
            f"{reader.file}: architectures is {asked!r} (model_type {model_type!r}); "
            f"supported: {', '.join(line.architecture for line in HF_FAMILIES)}"
        )
    if model_type is not None and model_type != chosen[0].family:
        reader.problems.append(f"model_type {model_type!r} contradicts architectures {asked!r}")
    return chosen[0]
