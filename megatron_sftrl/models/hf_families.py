"""The supported Hugging Face architectures, and what transformers 5 assumes where config.json is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Activation, Family, Norms, Routing
from megatron_sftrl.models.json_reader import JsonReader


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDefaults:
    """Experts that transformers assumes; `width` of one, under `width_key`, is None if it must be given.

    `shared_width` is that of a shared expert; None for a family that has none. With `routing` sigmoid the
    keys are DeepSeek-V3's: groups of experts, shared experts counted, the first layers dense.
    """

    num_experts: int
    experts_per_token: int
    width_key: str
    width: int | None
    shared_width: int | None = None
    routing: Routing = "softmax"
    num_dense_layers: int = 0
    num_groups: int = 1
    groups_per_token: int = 1
    weights_factor: float = 1.0
    normalizes_weights: bool = False


MULTIPLIERS = {
    "attention_multiplier": "attention_multiplier",
    "embedding_multiplier": "embedding_multiplier",
    "logits_scaling": "logits_divisor",
    "residual_multiplier": "residual_multiplier",
}
"""Granite's factors: by key, the field of an Architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfFamily:
    """One architecture of transformers, and the defaults of its configuration class.

    Args:
        family: our name, which is transformers' model_type too.
        architecture: the class that config.json names.
        num_key_value_heads: when absent; None for num_attention_heads.
        null_key_value_heads: a null there means num_attention_heads; otherwise transformers fails on it.
        head_dim: when absent; None for hidden_size / num_attention_heads.
        null_head_dim: a null there means that quotient; otherwise transformers fails on it.
        max_position_embeddings, norm_eps, rope_theta, tie_word_embeddings: when absent.
        sizes: by key, when absent; without a value here a size must be given.
        window: what decides about a sliding window. none: nothing, every layer attends to all. always:
            `sliding_window` alone. switch: `use_sliding_window` for all layers. layers: `use_sliding_window`
            with `layer_types` or `max_window_layers`. pattern: `sliding_window` with `layer_types`. off:
            `use_sliding_window`, which must be false.
        sliding_window: when absent, tokens.
        full_every: with window `layers` and without `layer_types`, every so manieth layer attends to all.
        full_every_key: says otherwise.
        mixture: None for a dense family.
        norms, norms_from_zero, qk_norm_spans_heads, scales_embedding, activation: as in an Architecture.
        activation_key: says which.
        fused: what the files hold as one tensor: q, k and v; gate and up; a matrix of all experts; what is
            projected for a key head of a gated delta net.
        bias_key: says whether q, k and v have biases; None for a family that always or never has them.
        qk_norm_key: says whether q and k are normalised; None for a family that always or never does it.
        has_latent: attention is DeepSeek-V3's.
        has_code: published files name code of their own, of which transformers has its own version.
        has_sinks, all_biases, gate_offset: as in an Architecture.
        quantised: the quant_method of files whose weights are dequantised while they are read; None for none.
        draft_keys: count layers that draft tokens, the last one in published files; they are left out.
        has_delta_net: layers are gated delta nets or attend, with gates on what they attend to.
        rope_kinds: that transformers and vLLM read alike in this family.
        rope_ignores: keys of a set that change nothing for text alone.
        rope: the set that stands for an absent one.
        partial_rotary: when absent, the fraction of a head that turns; None where it is always the whole.
        interleaved: of positions.
        rope_by_layer_type: rope_parameters has a set for each of `layer_types`.
        window_theta: when absent, that of layers with a window, which has a key of its own; None for
            rope_theta.
        no_rope_every: when no_rope_layers is absent, every so manieth layer is without positions.
        keys: that only this family reads.
        states: keys of transformers' class that can only be false here, which an export writes.
        for_vllm: keys that vLLM alone reads, and without which it builds another network.
        refuses: why, for keys whose presence is refused.
    """

    family: Family
    architecture: str
    num_key_value_heads: int | None = None
    null_key_value_heads: bool = False
    head_dim: int | None = None
    null_head_dim: bool = True
    max_position_embeddings: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    window: Literal["none", "always", "switch", "layers", "pattern", "off"]
    sliding_window: int | None = None
    full_every: int | None = None
    full_every_key: str | None = None
    mixture: MixtureDefaults | None = None
    norms: Norms = "before"
    norms_from_zero: bool = False
    qk_norm_spans_heads: bool = False
    scales_embedding: bool = False
    activation: Activation = "silu"
    activation_key: str = "hidden_act"
    fused: frozenset[Literal["qkv", "gate_up", "experts", "delta_net"]] = frozenset()
    bias_key: str | None = None
    qk_norm_key: str | None = None
    has_latent: bool = False
    has_code: bool = False
    has_sinks: bool = False
    all_biases: bool = False
    gate_offset: float = 0.0
    quantised: str | None = None
    draft_keys: tuple[str, ...] = ()
    has_delta_net: bool = False
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    rope_ignores: frozenset[str] = frozenset()
    rope: Mapping[str, Any] | None = None
    partial_rotary: float | None = None
    interleaved: bool = False
    rope_by_layer_type: bool = False
    window_theta: float | None = None
    no_rope_every: int | None = None
    keys: frozenset[str] = frozenset()
    states: tuple[str, ...] = ()
    for_vllm: Mapping[str, Any] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)


_DRAFTS = ("num_mtp_layers", "num_nextn_predict_layers")
"""Under transformers' name and that of the published files."""

HF_FAMILIES: tuple[HfFamily, ...] = (
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
        family="mixtral",
        architecture="MixtralForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=1e6,
        window="always",
        mixture=MixtureDefaults(
            num_experts=8, experts_per_token=2, width_key="intermediate_size", width=None
        ),
        refuses=dict.fromkeys(
            ("norm_topk_prob", "moe_intermediate_size"),
            "MixtralForCausalLM does not read it, remove it",
        ),
    ),
    HfFamily(
        family="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        num_key_value_heads=4,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="switch",
        sliding_window=4096,
        mixture=MixtureDefaults(
            num_experts=128, experts_per_token=8, width_key="moe_intermediate_size", width=768
        ),
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
        rope_kinds=("default",),
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
        family="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        num_key_value_heads=16,
        null_key_value_heads=True,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="off",
        mixture=MixtureDefaults(
            num_experts=60,
            experts_per_token=4,
            width_key="moe_intermediate_size",
            width=1408,
            shared_width=5632,
        ),
        bias_key="qkv_bias",
        refuses={"num_local_experts": "Qwen2MoeForCausalLM does not read it, give num_experts"},
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
        family="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        num_key_value_heads=8,
        null_key_value_heads=False,
        null_head_dim=False,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        window="none",
        mixture=MixtureDefaults(
            num_experts=128,
            experts_per_token=8,
            width_key="moe_intermediate_size",
            width=1408,
            routing="sigmoid",
            num_dense_layers=1,
        ),
        bias_key="attention_bias",
        qk_norm_key="use_qk_norm",
        draft_keys=_DRAFTS,
        rope_kinds=("default",),
        partial_rotary=0.5,
        refuses=dict.fromkeys(("num_experts", "num_local_experts"), "give n_routed_experts"),
    ),
    HfFamily(
        family="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        num_key_value_heads=128,
        null_key_value_heads=True,
        max_position_embeddings=4096,
        window="none",
        mixture=MixtureDefaults(
            num_experts=256,
            experts_per_token=8,
            width_key="moe_intermediate_size",
            width=2048,
            routing="sigmoid",
            num_dense_layers=3,
            num_groups=8,
            groups_per_token=4,
            weights_factor=2.5,
        ),
        has_latent=True,
        has_code=True,
        draft_keys=_DRAFTS,
        rope_kinds=("default", "yarn"),
        interleaved=True,
        states=("attention_bias",),
        for_vllm={
            "moe_layer_freq": 1,
            "moe_router_dtype": "float32",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        refuses=dict.fromkeys(("num_experts", "num_local_experts"), "give n_routed_experts"),
    ),
    HfFamily(
        family="gpt_oss",
        architecture="GptOssForCausalLM",
        num_key_value_heads=8,
        null_key_value_heads=True,
        head_dim=64,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=150000.0,
        window="pattern",
        sliding_window=128,
        full_every=2,
        mixture=MixtureDefaults(
            num_experts=128, experts_per_token=4, width_key="intermediate_size", width=2880
        ),
        fused=frozenset({"experts"}),
        has_sinks=True,
        all_biases=True,
        gate_offset=1.0,
        quantised="mxfp4",
        rope_kinds=("yarn",),
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        keys=frozenset({"swiglu_alpha", "swiglu_limit"}),
        refuses=dict.fromkeys(
            ("norm_topk_prob", "moe_intermediate_size"),
            "GptOssForCausalLM does not read it, remove it",
        ),
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
    HfFamily(
        family="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        num_key_value_heads=2,
        head_dim=256,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="none",
        mixture=MixtureDefaults(
            num_experts=256,
            experts_per_token=8,
            width_key="moe_intermediate_size",
            width=512,
            shared_width=512,
            normalizes_weights=True,
        ),
        norms_from_zero=True,
        has_delta_net=True,
        draft_keys=("mtp_num_hidden_layers",),
        rope_kinds=("default",),
        rope_ignores=frozenset({"mrope_interleaved", "mrope_section"}),
        partial_rotary=0.25,
        states=("attention_bias",),
        for_vllm={"attn_output_gate": True, "norm_topk_prob": True},
        refuses={"num_local_experts": "Qwen3_5MoeForCausalLM does not read it, give num_experts"},
    ),
    HfFamily(
        family="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        num_key_value_heads=2,
        head_dim=256,
        null_head_dim=False,
        max_position_embeddings=32768,
        window="none",
        mixture=MixtureDefaults(
            num_experts=512,
            experts_per_token=10,
            width_key="moe_intermediate_size",
            width=512,
            shared_width=512,
            normalizes_weights=True,
        ),
        fused=frozenset({"delta_net"}),
        norms_from_zero=True,
        has_delta_net=True,
        draft_keys=("num_nextn_predict_layers",),
        rope_kinds=("default",),
        partial_rotary=0.25,
        states=("attention_bias",),
        for_vllm={"attn_output_gate": True},
        refuses={"num_local_experts": "Qwen3NextForCausalLM does not read it, give num_experts"},
    ),
)


def hf_family(family: Family) -> HfFamily:
    return next(line for line in HF_FAMILIES if line.family == family)


def asked_family(reader: JsonReader) -> HfFamily:
    """The family that `architectures`, or without it `model_type`, names.

    Raises:
        UserError: none, several, or one that is not supported.
    """
    asked, model_type = reader.get("architectures"), reader.get("model_type")
    names = asked if isinstance(asked, list) else []
    if model_type == "kimi_k2":
        raise UserError(
            f"{reader.file}: model_type 'kimi_k2': transformers does not know it without the model's own "
            "code, which is never run; its network is DeepSeek-V3's: set model_type to deepseek_v3 and "
            "architectures to DeepseekV3ForCausalLM, and remove auto_map"
        )
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
