"""The one table of names: each tensor of a Megatron model, and the Hugging Face tensors it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_sftrl.models.architecture import Architecture, Latent, Norms
from megatron_sftrl.models.hf_families import hf_family

Shard = Literal["rows", "columns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A line of the table.

    Args:
        megatron: key, below "decoder.layers." for a tensor of every layer.
        hf: the tensors it is made of, below "model.layers.{layer}." for a tensor of every layer.
        rows: order of their rows. one: a single tensor. halves: one tensor below the other. groups: for each
            key/value head its query heads, their gates if there are any, the key head, the value head. Of
            halves and groups the files may hold all parts one below the other in a single tensor. keys: of a
            gated delta net, for each key head its query, its key, its values and what belongs to these.
        shard: the dimension that tensor parallelism cuts; of `halves` each half is cut. None: every rank has
            all of it.
        fused: the file has one tensor of all experts, [experts, columns, rows] or [experts, rows]; the rows
            of halves take turns in it.
    """

    megatron: str
    hf: tuple[str, ...]
    rows: Literal["one", "halves", "groups", "keys"] = "one"
    shard: Shard | None = None
    fused: bool = False


EMBEDDING = Rule(megatron="embedding.word_embeddings.weight", hf=("model.embed_tokens.weight",), shard="rows")
FINAL_NORM = Rule(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",))
OUTPUT = Rule(megatron="output_layer.weight", hf=("lm_head.weight",), shard="rows")

WHOLE_WEIGHTS = {rule.hf[0].split(".")[-2]: (rule.hf[0], rule.megatron) for rule in (EMBEDDING, OUTPUT)}
"""By the names of lora.modules_to_save, the tensor's name in Hugging Face's files and in Megatron's model."""

_QKV = Rule(
    megatron="self_attention.linear_qkv.weight",
    hf=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    rows="groups",
    shard="rows",
)
_QKV_BIAS = Rule(
    megatron="self_attention.linear_qkv.bias",
    hf=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    rows="groups",
    shard="rows",
)
_QK_NORM = (
    Rule(megatron="self_attention.q_layernorm.weight", hf=("self_attn.q_norm.weight",)),
    Rule(megatron="self_attention.k_layernorm.weight", hf=("self_attn.k_norm.weight",)),
)
_SPANNING_QK_NORM = tuple(replace(rule, shard="rows") for rule in _QK_NORM)
_PROJECTION = Rule(
    megatron="self_attention.linear_proj.weight", hf=("self_attn.o_proj.weight",), shard="columns"
)
_PROJECTION_BIAS = Rule(megatron="self_attention.linear_proj.bias", hf=("self_attn.o_proj.bias",))
_SINKS = Rule(megatron="self_attention.core_attention.softmax_offset", hf=("self_attn.sinks",), shard="rows")
_FC1 = Rule(
    megatron="mlp.linear_fc1.weight",
    hf=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    rows="halves",
    shard="rows",
)
_FC2 = Rule(megatron="mlp.linear_fc2.weight", hf=("mlp.down_proj.weight",), shard="columns")
_LATENT_QUERY = Rule(
    megatron="self_attention.linear_q_proj.weight", hf=("self_attn.q_proj.weight",), shard="rows"
)
_QUERY_DOWN = Rule(megatron="self_attention.linear_q_down_proj.weight", hf=("self_attn.q_a_proj.weight",))
_QUERY_NORM = Rule(megatron="self_attention.q_layernorm.weight", hf=("self_attn.q_a_layernorm.weight",))
_QUERY_UP = Rule(
    megatron="self_attention.linear_q_up_proj.weight", hf=("self_attn.q_b_proj.weight",), shard="rows"
)
_LATENT_DOWN = Rule(
    megatron="self_attention.linear_kv_down_proj.weight", hf=("self_attn.kv_a_proj_with_mqa.weight",)
)
_LATENT_NORM = Rule(megatron="self_attention.kv_layernorm.weight", hf=("self_attn.kv_a_layernorm.weight",))
_LATENT_UP = Rule(
    megatron="self_attention.linear_kv_up_proj.weight", hf=("self_attn.kv_b_proj.weight",), shard="rows"
)
_DELTA_IN = Rule(
    megatron="self_attention.in_proj.weight",
    hf=tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")),
    rows="keys",
    shard="rows",
)
FUSED_DELTA_IN = replace(_DELTA_IN, hf=("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"))
_DELTA_CONVOLUTION = Rule(
    megatron="self_attention.conv_weight", hf=("linear_attn.conv1d.weight",), rows="keys", shard="rows"
)
_DELTA_DECAY = Rule(megatron="self_attention.A_log", hf=("linear_attn.A_log",), shard="rows")
_DELTA_TIME = Rule(megatron="self_attention.dt_bias", hf=("linear_attn.dt_bias",), shard="rows")
_DELTA_NORM = Rule(megatron="self_attention.out_norm.weight", hf=("linear_attn.norm.weight",))
_DELTA_OUT = replace(_PROJECTION, hf=("linear_attn.out_proj.weight",))
_DELTA_NET = (_DELTA_DECAY, _DELTA_TIME, _DELTA_CONVOLUTION, _DELTA_OUT, _DELTA_NORM)
_FUSED_QKV = replace(_QKV, hf=("self_attn.qkv_proj.weight",))
_FUSED_FC1 = replace(_FC1, hf=("mlp.gate_up_proj.weight",))

_NORMS: dict[Norms, dict[str, str]] = {
    "before": {"before attention": "input_layernorm", "before mlp": "post_attention_layernorm"},
    "behind": {"behind attention": "post_attention_layernorm", "behind mlp": "post_feedforward_layernorm"},
    "both": {
        "before attention": "input_layernorm",
        "behind attention": "post_self_attn_layernorm",
        "before mlp": "post_attention_layernorm",
        "behind mlp": "post_mlp_layernorm",
    },
}
"""Names in the files, by place."""
_GEMMA_NORMS = {
    "before attention": "input_layernorm",
    "behind attention": "post_attention_layernorm",
    "before mlp": "pre_feedforward_layernorm",
    "behind mlp": "post_feedforward_layernorm",
}


def _norm(architecture: Architecture, place: str, megatron: str) -> Iterator[Rule]:
    """The norm at that place, if the blocks have one there."""
    names = _GEMMA_NORMS if architecture.family == "gemma3_text" else _NORMS[architecture.norms]
    if (name := names.get(place)) is not None:
        yield Rule(megatron=megatron, hf=(f"{name}.weight",))


EXPERTS = "mlp.experts.experts."


def _mixture(router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    return (
        Rule(megatron="mlp.router.weight", hf=(router,)),
        Rule(megatron=f"{EXPERTS}linear_fc1.weight", hf=(gate, up), rows="halves", shard="rows"),
        Rule(megatron=f"{EXPERTS}linear_fc2.weight", hf=(down,), shard="columns"),
    )


_FUSED_FC1_OF_EXPERTS = Rule(
    megatron=f"{EXPERTS}linear_fc1.weight",
    hf=("mlp.experts.gate_up_proj",),
    rows="halves",
    shard="rows",
    fused=True,
)
_FUSED_FC2_OF_EXPERTS = Rule(
    megatron=f"{EXPERTS}linear_fc2.weight", hf=("mlp.experts.down_proj",), shard="columns", fused=True
)
_BIASED_MIXTURE = (
    Rule(megatron="mlp.router.weight", hf=("mlp.router.weight",)),
    Rule(megatron="mlp.router.bias", hf=("mlp.router.bias",)),
    _FUSED_FC1_OF_EXPERTS,
    replace(
        _FUSED_FC1_OF_EXPERTS,
        megatron=f"{EXPERTS}linear_fc1.bias",
        hf=("mlp.experts.gate_up_proj_bias",),
    ),
    _FUSED_FC2_OF_EXPERTS,
    replace(
        _FUSED_FC2_OF_EXPERTS,
        megatron=f"{EXPERTS}linear_fc2.bias",
        hf=("mlp.experts.down_proj_bias",),
        shard=None,
    ),
)


_QWEN_MIXTURE = _mixture(
    "mlp.gate.weight",
    "mlp.experts.{expert}.gate_proj.weight",
    "mlp.experts.{expert}.up_proj.weight",
    "mlp.experts.{expert}.down_proj.weight",
)
_MIXTRAL_MIXTURE = _mixture(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{expert}.w1.weight",
    "block_sparse_moe.experts.{expert}.w3.weight",
    "block_sparse_moe.experts.{expert}.w2.weight",
)
_OTHER_MIXTURES = {
    "mixtral": _MIXTRAL_MIXTURE,
    "minimax_m2": _MIXTRAL_MIXTURE,
    "gpt_oss": _BIASED_MIXTURE,
}
ROUTING_BIAS = Rule(megatron="mlp.router.expert_bias", hf=("mlp.gate.e_score_correction_bias",))
_MINIMAX_ROUTING_BIAS = replace(ROUTING_BIAS, hf=("block_sparse_moe.e_score_correction_bias",))


def _shared_expert(name: str) -> tuple[Rule, ...]:
    return (
        Rule(
            megatron="mlp.shared_experts.linear_fc1.weight",
            hf=(f"mlp.{name}.gate_proj.weight", f"mlp.{name}.up_proj.weight"),
            rows="halves",
            shard="rows",
        ),
        Rule(
            megatron="mlp.shared_experts.linear_fc2.weight",
            hf=(f"mlp.{name}.down_proj.weight",),
            shard="columns",
        ),
    )


_SHARED_GATE = Rule(megatron="mlp.shared_experts.gate_weight", hf=("mlp.shared_expert_gate.weight",))
_GATED_SHARED_EXPERT = (_SHARED_GATE, *_shared_expert("shared_expert"))
_SHARED_EXPERT = _shared_expert("shared_experts")


def layer_rules(architecture: Architecture, layer: int) -> Iterator[Rule]:
    a, fused = architecture, hf_family(architecture.family).fused
    if a.latent is not None:
        yield from _norm(a, "before attention", "input_layernorm.weight")
        yield from (_QUERY_DOWN, _QUERY_NORM, _QUERY_UP) if a.latent.query_rank else (_LATENT_QUERY,)
        yield from (_LATENT_DOWN, _LATENT_NORM, _LATENT_UP)
    elif not a.attends(layer):
        yield from _norm(a, "before attention", "input_layernorm.weight")
        yield from (*_DELTA_NET, FUSED_DELTA_IN if "delta_net" in fused else _DELTA_IN)
    else:
        yield from _norm(a, "before attention", "self_attention.linear_qkv.layer_norm_weight")
        yield _FUSED_QKV if "qkv" in fused else _QKV
        if a.qkv_bias:
            yield _QKV_BIAS
        if a.qk_norm:
            yield from _SPANNING_QK_NORM if a.qk_norm_spans_heads else _QK_NORM
        if a.has_sinks:
            yield _SINKS
    if a.attends(layer):
        yield _PROJECTION
    if a.all_biases:
        yield _PROJECTION_BIAS
    yield from _norm(a, "behind attention", "post_self_attn_layernorm.weight")
    if not a.has_experts(layer):
        yield from _norm(a, "before mlp", "mlp.linear_fc1.layer_norm_weight")
        yield from (_FUSED_FC1 if "gate_up" in fused else _FC1, _FC2)
    else:
        assert a.mixture is not None
        yield from _norm(a, "before mlp", "pre_mlp_layernorm.weight")
        yield from _OTHER_MIXTURES.get(a.family, _QWEN_MIXTURE)
        if a.mixture.routing == "sigmoid":
            yield _MINIMAX_ROUTING_BIAS if a.family == "minimax_m2" else ROUTING_BIAS
        if a.mixture.shared_width:
            yield from _GATED_SHARED_EXPERT if a.mixture.shared_is_gated else _SHARED_EXPERT
    yield from _norm(a, "behind mlp", "post_mlp_layernorm.weight")


def num_rows_of(rule: Rule, a: Architecture) -> int:
    """Rows of each part of a rule that is neither `groups` nor `keys`."""
    if a.latent is not None and (shape := _latent_shape(rule, a, a.latent)) is not None:
        return shape[0]
    if rule in (EMBEDDING, OUTPUT):
        return a.vocab_size
    if rule in _QK_NORM:
        return a.head_dim
    if rule in _SPANNING_QK_NORM:
        heads = a.num_attention_heads if rule is _SPANNING_QK_NORM[0] else a.num_query_groups
        return heads * a.head_dim
    if ".router." in rule.megatron:
        assert a.mixture is not None
        return a.mixture.num_experts
    if rule is _SINKS:
        return a.num_attention_heads
    if rule in (_DELTA_DECAY, _DELTA_TIME, _DELTA_NORM):
        assert a.delta_net is not None
        return a.delta_net.value_dim if rule is _DELTA_NORM else a.delta_net.num_value_heads
    if rule is _SHARED_GATE:
        return 1
    return _ffn_width(rule, a) if rule.rows == "halves" else a.hidden_size


def shape_of_row(rule: Rule, a: Architecture) -> tuple[int, ...]:
    """(columns,) of a matrix, () of a vector."""
    if rule.megatron.endswith(("norm.weight", "norm_weight", "bias", "softmax_offset", "A_log")):
        return ()
    if a.latent is not None and (shape := _latent_shape(rule, a, a.latent)) is not None:
        return shape[1:]
    if a.delta_net is not None and rule is _DELTA_CONVOLUTION:
        return 1, a.delta_net.kernel
    if a.delta_net is not None and rule is _DELTA_OUT:
        return (a.delta_net.num_value_heads * a.delta_net.value_dim,)
    if rule.megatron.endswith("linear_proj.weight"):
        return (a.num_attention_heads * a.value_dim,)
    return (_ffn_width(rule, a) if rule.megatron.endswith("linear_fc2.weight") else a.hidden_size,)


def _latent_shape(rule: Rule, a: Architecture, latent: Latent) -> tuple[int, int] | None:
    """(rows, columns) of what latent attention alone has, the latter without meaning for norms; else None."""
    query_rank = latent.query_rank or 0
    queries = a.num_attention_heads * a.head_dim
    both = a.num_attention_heads * (a.head_dim - latent.rope_dim + latent.value_dim)
    return {
        _LATENT_QUERY: (queries, a.hidden_size),
        _QUERY_DOWN: (query_rank, a.hidden_size),
        _QUERY_NORM: (query_rank, 0),
        _QUERY_UP: (queries, query_rank),
        _LATENT_DOWN: (latent.rank + latent.rope_dim, a.hidden_size),
        _LATENT_NORM: (latent.rank, 0),
        _LATENT_UP: (both, latent.rank),
    }.get(rule)


def _ffn_width(rule: Rule, a: Architecture) -> int:
    if a.mixture and ".shared_experts." in rule.megatron:
        return a.mixture.shared_width
    return a.mixture.dense_width if a.mixture and ".experts." not in rule.megatron else a.ffn_hidden_size
