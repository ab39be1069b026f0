"""What a supported Hugging Face architecture is: transformers' defaults, and what is read of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sftrl.models.architecture import Activation, Family, Norms, Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDefaults:
    """Experts that transformers assumes; `width` of one, under `width_key`, is None if it must be given.

    `shared_width` is that of a shared expert; None for a family that has none. With `has_groups` the keys are
    DeepSeek-V3's: groups of experts, shared experts counted, the first layers dense.
    """

    num_experts: int
    experts_per_token: int
    width_key: str
    width: int | None
    shared_width: int | None = None
    routing: Routing = "softmax"
    has_groups: bool = False
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
            projected for a key head of a gated delta net. stacks: of exports, as transformers has no other
            form: [experts, rows, columns], gate above up.
        bias_key: says whether q, k and v have biases; None for a family that always or never has them.
        qk_norm_key: says whether q and k are normalised; None for a family that always or never does it.
        has_latent: attention is DeepSeek-V3's.
        latent_head_dim: what head_dim means there: the dimensions that turn, or all of them, of which
            partial_rotary_factor is then the share that turns.
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
    fused: frozenset[Literal["qkv", "gate_up", "experts", "delta_net", "stacks"]] = frozenset()
    bias_key: str | None = None
    qk_norm_key: str | None = None
    has_latent: bool = False
    latent_head_dim: Literal["turning", "all"] = "turning"
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


DRAFTS = ("num_mtp_layers", "num_nextn_predict_layers")
"""Under transformers' name and that of the published files."""
