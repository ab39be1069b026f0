"""Random small architectures of every family, for properties that hold for all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from megatron_sftrl.models.architecture import (
    MIXTURE_FAMILIES,
    Architecture,
    DeltaNet,
    Family,
    Latent,
    Mixture,
    has_qk_norm,
    has_qkv_bias,
)
from megatron_sftrl.models.hf_families import MULTIPLIERS, HfFamily, hf_family
from megatron_sftrl.models.rope import (
    Rope,
    latent_attention_multiplier,
    longrope_attention_factor,
    yarn_attention_factor,
)

FAMILIES: tuple[Family, ...] = get_args(Family)


def random_architecture(rng: random.Random, family: Family) -> Architecture:
    """Sizes that form a network and that no two fields share by construction."""
    groups, num_layers = rng.randint(1, 4), rng.randint(1, 4)
    line, head_dim = hf_family(family), 2 * rng.randint(1, 8)
    heads = groups if line.has_latent else groups * rng.randint(1, 4)
    max_positions = rng.randint(8, 9000)
    latent = _latent(rng) if line.has_latent else None
    head_dim = latent.rope_dim + rng.randint(1, 9) if latent else head_dim
    window, window_layers = _window(rng, line, num_layers, max_positions)
    rope, width = _rope(rng, line, head_dim), rng.randint(2, 24)
    if rope.kind == "longrope" and rope.original_length is not None:
        # What a file has as the longest sequence, and what is built of it.
        max_positions = min(rope.original_length, round(rope.factor * rope.original_length))
        window, window_layers = None, ()
    factors = {field: rng.uniform(0.1, 9) for key, field in MULTIPLIERS.items() if key in line.keys}
    if family == "gemma3_text":
        factors["attention_multiplier"] = rng.randint(1, 300) ** -0.5
    if rope.mscale_all_dim:
        factors["attention_multiplier"] = latent_attention_multiplier(rope, head_dim)
    return Architecture(
        family=family,
        num_layers=num_layers,
        hidden_size=_hidden_size(rng, family, heads, head_dim),
        ffn_hidden_size=width,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=rng.randint(3, 40),
        max_position_embeddings=max_positions,
        rope=rope,
        sliding_window=window,
        window_layers=window_layers,
        norm_eps=10 ** rng.uniform(-7, -3),
        tie_embeddings=rng.random() < 0.5,
        qkv_bias=has_qkv_bias(family) if line.bias_key is None else rng.random() < 0.5,
        qk_norm=has_qk_norm(family) if line.qk_norm_key is None else rng.random() < 0.5,
        mixture=_mixture(rng, family, num_layers, width),
        init_std=rng.uniform(0.001, 0.5),
        norms=line.norms,
        qk_norm_spans_heads=line.qk_norm_spans_heads,
        window_rope=_rope(rng, line, head_dim) if line.rope_by_layer_type and window_layers else None,
        has_sinks=line.has_sinks,
        all_biases=line.all_biases,
        gate_slope=rng.uniform(1, 2) if line.gate_offset else 1.0,
        gate_limit=rng.uniform(1, 9) if line.gate_offset else None,
        gate_offset=line.gate_offset,
        no_rope_layers=_some(rng, num_layers) if line.no_rope_every else (),
        latent=latent,
        delta_net=_delta_net(rng, num_layers) if line.has_delta_net else None,
        has_output_gate=line.has_delta_net,
        norms_from_zero=line.norms_from_zero,
        scales_embedding=line.scales_embedding,
        activation=line.activation,
        **factors,
    )


def _hidden_size(rng: random.Random, family: Family, heads: int, head_dim: int) -> int:
    if family == "phi3":  # of which transformers counts longrope's factors
        return heads * head_dim
    return heads * rng.randint(1, 3) if family in ("llama", "gemma3_text") else rng.randint(3, 24)


def _delta_net(rng: random.Random, num_layers: int) -> DeltaNet | None:
    key_heads = rng.randint(1, 3)
    if rng.random() < 0.2:
        return None
    return DeltaNet(
        layers=_some(rng, num_layers),
        num_key_heads=key_heads,
        num_value_heads=key_heads * rng.randint(1, 3),
        key_dim=rng.randint(1, 9),
        value_dim=rng.randint(1, 9),
        kernel=rng.randint(2, 4),
    )


def _latent(rng: random.Random) -> Latent:
    return Latent(
        query_rank=rng.choice([None, rng.randint(1, 9)]),
        rank=rng.randint(1, 9),
        rope_dim=2 * rng.randint(1, 4),
        value_dim=rng.randint(1, 9),
    )


def _rope(rng: random.Random, line: HfFamily, head_dim: int) -> Rope:
    kinds = [kind for kind in line.rope_kinds if kind != "longrope"]
    rope = random_rope(rng, kinds)
    if line.rope_by_layer_type:
        rope = replace(rope, truncate=True)
    if line.family in ("ministral3", "mistral4"):
        rope = replace(rope, query_beta=rng.choice([0.0, rng.uniform(0.1, 2)]))
    if line.has_latent and rope.kind == "yarn":
        multipliers = rng.choice([(0.0, 0.0), (rng.uniform(0.1, 2), rng.uniform(0.1, 2))])
        factor = yarn_attention_factor(rope.factor, *multipliers)
        rope = replace(rope, truncate=True, attention_factor=factor)
        rope = replace(rope, mscale=multipliers[0], mscale_all_dim=multipliers[1])
    if line.partial_rotary is not None:
        turning = 2 * rng.randint(1, head_dim // 2)
        fraction = turning / head_dim if int(head_dim * (turning / head_dim)) == turning else 1.0
        rope = replace(rope, fraction=fraction)
    if "longrope" in line.rope_kinds and rng.random() < 0.5:
        rope = _longrope(rng, rope, rope.turning(head_dim) // 2)
    return replace(rope, interleaved=line.interleaved)


def _longrope(rng: random.Random, rope: Rope, num_factors: int) -> Rope:
    original, longest = rng.randint(2, 9000), rng.randint(2, 200000)
    return replace(
        rope,
        kind="longrope",
        factor=longest / original,
        original_length=original,
        attention_factor=longrope_attention_factor(longest / original, original),
        short_factors=tuple(rng.choice([1, 1.0, rng.uniform(1, 3)]) for _ in range(num_factors)),
        long_factors=tuple(rng.uniform(1, 60) for _ in range(num_factors)),
    )


def random_rope(rng: random.Random, kinds: Sequence[str] = ("default", "linear", "llama3", "yarn")) -> Rope:
    theta = 10 ** rng.uniform(2, 7)
    kind = rng.choice(kinds)
    if kind == "default":
        return Rope(kind="default", theta=theta)
    factor = rng.choice([1.0, 2.0, rng.uniform(1, 40)])
    if kind == "linear":
        return Rope(kind="linear", theta=theta, factor=factor)
    original_length = rng.randint(8, 40000)
    if kind == "llama3":
        low = rng.uniform(0.5, 4)
        return Rope(
            kind="llama3",
            theta=theta,
            factor=factor,
            original_length=original_length,
            low_freq_factor=low,
            high_freq_factor=low + rng.uniform(0.1, 8),
        )
    beta_slow = rng.choice([1.0, rng.uniform(0.1, 8)])
    return Rope(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_length=original_length,
        beta_fast=beta_slow + rng.uniform(0, 60),
        beta_slow=beta_slow,
        truncate=rng.random() < 0.5,
        attention_factor=rng.uniform(0.5, 2),
    )


def _window(
    rng: random.Random, line: HfFamily, num_layers: int, max_positions: int
) -> tuple[int | None, tuple[int, ...]]:
    if line.window in ("none", "off") or rng.random() < 0.4:
        return None, ()
    some = line.window in ("layers", "pattern")
    layers = _some(rng, num_layers) if some else tuple(range(num_layers))
    return rng.randint(1, max_positions - 1), layers


def _some(rng: random.Random, num_layers: int) -> tuple[int, ...]:
    layers = tuple(range(num_layers))
    return tuple(layer for layer in layers if rng.random() < 0.6) or layers


def _mixture(rng: random.Random, family: Family, num_layers: int, width: int) -> Mixture | None:
    if family not in MIXTURE_FAMILIES:
        return None
    if family in ("glm4_moe", "deepseek_v3"):
        return _sigmoid(rng, num_layers, width)
    if family == "mistral4":
        ungrouped = replace(_sigmoid(rng, num_layers, width), num_groups=1, groups_per_token=1)
        return replace(ungrouped, routing="softmax", normalizes_weights=rng.random() < 0.5)
    num_experts = rng.randint(1, 5)
    always_normalizes = family in ("mixtral", "minimax_m2", "gpt_oss", "qwen3_5_moe_text")
    return Mixture(
        num_experts=num_experts,
        experts_per_token=rng.randint(1, num_experts),
        normalizes_weights=always_normalizes or rng.random() < 0.5,
        routing="sigmoid" if family == "minimax_m2" else "softmax",
        shared_width=rng.randint(1, 24) if family in ("qwen2_moe", "qwen3_5_moe_text", "qwen3_next") else 0,
    )


def _sigmoid(rng: random.Random, num_layers: int, width: int) -> Mixture:
    groups = rng.choice([1, 2, 4])
    per_token = rng.randint(1, groups)
    dense = rng.randint(0, num_layers)
    return Mixture(
        num_experts=4 * groups,
        experts_per_token=2 * per_token,
        normalizes_weights=True,
        shared_width=width * rng.randint(1, 2),
        shared_is_gated=False,
        routing="sigmoid",
        num_groups=groups,
        groups_per_token=per_token,
        weights_factor=rng.choice([1.0, rng.uniform(0.5, 3)]),
        num_dense_layers=dense,
        dense_width=rng.randint(1, 24) if dense else 0,
    )
