"""The sizes and switches of a decoder-only transformer, independent of any training library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from megatron_sftrl.config.schema import ArchitectureSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.rope import Rope

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "phi3",
    "ministral3",
    "qwen2_moe",
    "glm4",
    "glm4_moe",
    "deepseek_v3",
    "mistral4",
    "minimax_m2",
    "gpt_oss",
    "gemma3_text",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
]
Norms = Literal["before", "behind", "both"]
Routing = Literal["softmax", "sigmoid"]
Activation = Literal["silu", "gelu_pytorch_tanh"]
MIXTURE_FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3", "mistral4", "gpt_oss")
MIXTURE_FAMILIES += ("minimax_m2", "qwen3_5_moe_text", "qwen3_next")
_HYBRID_FAMILIES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A mixture of experts in place of each block's MLP.

    Args:
        num_experts: E, gated MLPs in each block.
        experts_per_token: of them, those that a token visits: the ones with the largest router logits.
        normalizes_weights: their weights, the softmax or sigmoid of the logits, are divided by their sum.
        shared_width: of one more MLP that every token visits; 0 for none.
        shared_is_gated: times the sigmoid of a gate.
        routing: sigmoid: of fp32 logits, and experts are chosen by it plus a bias of each expert that no
            gradient reaches (arXiv:2408.15664).
        num_groups, groups_per_token: a token's experts are all of the groups, equal runs of experts, in which
            the two largest make the largest sums.
        weights_factor: of the weights, once they are normalised.
        num_dense_layers: the first layers, which have a gated MLP of `dense_width` instead.
    """

    num_experts: int
    experts_per_token: int
    normalizes_weights: bool
    shared_width: int = 0
    # What records of older checkpoints do not have.
    shared_is_gated: bool = True
    routing: Routing = "softmax"
    num_groups: int = 1
    groups_per_token: int = 1
    weights_factor: float = 1.0
    num_dense_layers: int = 0
    dense_width: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"experts_per_token = {self.experts_per_token} must lie between 1 and num_experts = "
                f"{self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise UserError(f"{self.num_experts} experts do not divide into {self.num_groups} groups")
        # Megatron adds the largest experts_per_token // groups_per_token of each group.
        if self.num_groups > 1 and self.experts_per_token // self.groups_per_token != 2:
            raise UserError(
                f"{self.experts_per_token} experts of {self.groups_per_token} of {self.num_groups} groups: "
                "groups are only supported with two experts for each group that a token visits"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Keys and values of all heads out of one vector a token: latent attention (arXiv:2405.04434, 2.1).

    Args:
        query_rank: width of the vector that queries are made of; None where it is the residual stream.
        rank: width of the vector that keys and values are made of.
        rope_dim: dimensions of each head that turn, the last ones; of keys they are the same in every head.
        value_dim: of each head.
        norm_eps: of the norms of both vectors.
    """

    query_rank: int | None
    rank: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6
    """transformers gives these norms no other, whatever rms_norm_eps says."""


DELTA_CHUNK = 64
"""Tokens of a gated delta net whose corrections are solved for at once; only chunks wait for each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNet:
    """Layers that keep a matrix a head of the past instead of its keys and values (arXiv:2412.06464).

    Args:
        layers: which they are, counted from 0; the others attend.
        num_key_heads, num_value_heads: each key head serves an equal run of value heads.
        key_dim, value_dim: of each head.
        kernel: tokens, the current one included, that the convolution of queries, keys and values sees.
    """

    layers: tuple[int, ...]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise UserError(
                f"linear_num_value_heads = {self.num_value_heads} is not a multiple of "
                f"linear_num_key_heads = {self.num_key_heads}: every key head serves as many value heads"
            )

    @property
    def value_heads_each(self) -> int:
        """Value heads of a key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def channels_each(self) -> int:
        """Of what the convolution sees, for a key head: its query, its key, its values."""
        return 2 * self.key_dim + self.value_heads_each * self.value_dim

    @property
    def rows_each(self) -> int:
        """Of the projection that a key head is made of: the same, gates, and two numbers a value head."""
        return self.channels_each + self.value_heads_each * (self.value_dim + 2)

    def state_bytes(self, *, tp: int, element: int) -> int:
        """What one of tp ranks keeps of a sequence in a layer: fp32 matrices and inputs of the convolution,
        of `element` bytes each."""
        matrices = self.num_value_heads // tp * self.key_dim * self.value_dim * 4
        return matrices + self.num_key_heads // tp * self.channels_each * (self.kernel - 1) * element


class LayerKind(NamedTuple):
    """Whether a layer has a mixture or an MLP, and attention or a gated delta net."""

    has_experts: bool
    attends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A transformer with RMSNorm, rotary positions, grouped-query attention and a gated MLP.

    Args:
        family: block layout; names the table of parameter names.
        hidden_size: H, width of the residual stream.
        ffn_hidden_size: width of the gated MLP, in a mixture of each expert.
        num_attention_heads, num_query_groups: query heads, and key/value heads.
        head_dim: heads * head_dim need not be H.
        vocab_size: V, before padding for tensor parallelism.
        max_position_embeddings: longest sequence, tokens; of a longrope its original length, if that is less.
        sliding_window: positions that a token of a window layer attends to, its own included; None for all.
        window_layers: the layers, counted from 0, that attend over the sliding window only.
        norm_eps: added to the variance in RMSNorm.
        tie_embeddings: the output layer is the embedding.
        qkv_bias: q, k and v projections have biases.
        qk_norm: RMSNorm over each head of q and k.
        mixture: None for a dense model.
        init_std: standard deviation of random weights.
        norms: where each block's attention and MLP have theirs: before them, behind them (on what is added
            to the residual stream) or both.
        qk_norm_spans_heads: the norms of q and k are over all heads together.
        window_rope: positions in window_layers, where they are not those of the other layers.
        no_rope_layers: the layers, counted from 0, without positions.
        embedding_multiplier: of the embedding's output.
        scales_embedding: that is multiplied by sqrt(hidden_size), rounded to the model's dtype.
        attention_multiplier: of queries times keys; None for 1 / sqrt(head_dim).
        residual_multiplier: of what attention and MLP add to the residual stream.
        logits_divisor: of the logits.
        latent: None for keys and values out of the residual stream; head_dim is that of queries and keys.
        has_sinks: each query head attends to a logit of its own, besides, that has no value.
        all_biases: the output of attention, the router and both matrices of the experts have biases, too.
        activation: of an MLP's gate.
        gate_slope: with silu the gate g becomes g sigmoid(gate_slope g).
        gate_limit: g is cut off above it, what it is multiplied with above and below; None for neither.
        gate_offset: is added to the latter.
        delta_net: of a hybrid, the layers that have no attention; None where all attend.
        has_output_gate: what each query head has attended to is multiplied by the sigmoid of a gate.
        norms_from_zero: norms multiply by 1 + weight.
    Raises:
        UserError: sizes that cannot form a network.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope: Rope
    sliding_window: int | None
    window_layers: tuple[int, ...]
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    mixture: Mixture | None
    init_std: float
    # What records of older checkpoints do not have.
    norms: Norms = "before"
    qk_norm_spans_heads: bool = False
    window_rope: Rope | None = None
    no_rope_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    latent: Latent | None = None
    has_sinks: bool = False
    all_biases: bool = False
    gate_slope: float = 1.0
    gate_limit: float | None = None
    gate_offset: float = 0.0
    delta_net: DeltaNet | None = None
    has_output_gate: bool = False
    norms_from_zero: bool = False
    scales_embedding: bool = False
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_query_groups = {self.num_query_groups}: every group serves as many query heads"
            )
        if self.rope.turning(self.rope_head_dim) % 2:
            part = "" if self.rope.fraction == 1 else f", of which {self.rope.fraction:g} turn"
            part = part if self.latent is None else f", of which {self.latent.rope_dim} turn"
            raise UserError(f"head_dim = {self.head_dim}{part}: rotary positions need an even number")
        wanted = self.rope.turning(self.rope_head_dim) // 2 if self.rope.kind == "longrope" else 0
        given = (len(self.rope.short_factors), len(self.rope.long_factors))
        if given != (wanted, wanted):
            raise UserError(
                f"short_factor and long_factor hold {given[0]} and {given[1]} numbers: expected {wanted}, "
                "one for each two dimensions of a head that turn"
            )
        if self.family in ("llama", "gemma3_text") and self.hidden_size % self.num_attention_heads:
            other = "; use family mistral, which has the same blocks" if self.family == "llama" else ""
            raise UserError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
                f"{self.num_attention_heads}: transformers refuses such a {self.family}, whatever its "
                f"head_dim{other}"
            )
        assert (self.sliding_window is None) == (not self.window_layers)

    @property
    def rope_head_dim(self) -> int:
        """Dimensions of a head of which a rope turns all or its fraction."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Of each head."""
        return self.latent.value_dim if self.latent else self.head_dim

    def cached_by_vllm(self, tp: int) -> int:
        """Elements that vLLM keeps of a token in each layer, on one of `tp` ranks."""
        if self.latent is not None:
            return self.latent.rank + self.latent.rope_dim
        return 2 * max(1, self.num_query_groups // tp) * self.head_dim

    @property
    def turns_in_fp32(self) -> bool:
        """Norms over all heads give q and k in fp32, which are rounded behind their positions, not before."""
        return self.family in ("olmo2", "olmo3")

    def rope_of(self, layer: int) -> Rope | None:
        """Positions in a layer, counted from 0; None where there are none."""
        if layer in self.no_rope_layers:
            return None
        return self.window_rope if self.window_rope and layer in self.window_layers else self.rope

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has a mixture in place of its MLP."""
        return self.mixture is not None and layer >= self.mixture.num_dense_layers

    @property
    def layers_with_experts(self) -> tuple[int, ...]:
        """Those layers, counted from 0."""
        return tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))

    @property
    def num_dense_layers(self) -> int:
        """Layers of a mixture that have an MLP, the first ones."""
        return self.mixture.num_dense_layers if self.mixture else 0

    def attends(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has attention, not a gated delta net."""
        return self.delta_net is None or layer not in self.delta_net.layers

    @property
    def share_attending(self) -> float:
        """Of the layers, the share that have attention."""
        return 1 - len(self.delta_net.layers) / self.num_layers if self.delta_net else 1.0

    def kind(self, layer: int) -> LayerKind:
        """What a layer, counted from 0, is made of."""
        return LayerKind(has_experts=self.has_experts(layer), attends=self.attends(layer))

    @property
    def has_layers_of_kinds(self) -> bool:
        """Layers differ in what they are made of; Megatron stacks in a checkpoint those that are alike."""
        return self.num_dense_layers > 0 or self.delta_net is not None


def from_section(section: ArchitectureSection) -> Architecture:
    """The architecture that explicit sizes describe.

    Raises:
        UserError: a width that the heads do not divide, heads that the groups do not divide.
    """
    head_dim = section.head_dim
    if head_dim is None:
        head_dim = divided_head_dim(section.hidden_size, section.num_attention_heads)
    return Architecture(
        family=section.family,
        num_layers=section.num_layers,
        hidden_size=section.hidden_size,
        ffn_hidden_size=section.ffn_hidden_size,
        num_attention_heads=section.num_attention_heads,
        num_query_groups=section.num_query_groups or section.num_attention_heads,
        head_dim=head_dim,
        vocab_size=section.vocab_size,
        max_position_embeddings=section.max_position_embeddings,
        rope=Rope(kind="default", theta=section.rope_theta),
        sliding_window=None,
        window_layers=(),
        norm_eps=section.norm_eps,
        tie_embeddings=section.tie_embeddings,
        qkv_bias=has_qkv_bias(section.family),
        qk_norm=has_qk_norm(section.family),
        mixture=_mixture(section),
        init_std=section.init_std,
    )


def to_record(architecture: Architecture) -> dict[str, Any]:
    """Every field as plain JSON values, for a checkpoint's record."""
    return json.loads(json.dumps(asdict(architecture)))


def from_record(record: Mapping[str, Any]) -> Architecture:
    """The architecture that to_record() wrote.

    Raises:
        UserError: fields that are missing, unknown or do not fit together.
    """
    fields = dict(record)
    try:
        kinds = {"rope": Rope, "window_rope": Rope, "mixture": Mixture, "latent": Latent}
        kinds |= {"delta_net": DeltaNet}
        for name, kind in kinds.items():
            if (inside := fields.get(name)) is not None:
                lists = {key: tuple(value) for key, value in inside.items() if isinstance(value, list)}
                fields[name] = kind(**{**inside, **lists})
        fields["window_layers"] = tuple(fields["window_layers"])
        fields["no_rope_layers"] = tuple(fields.get("no_rope_layers", ()))
        return Architecture(**fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"the record of an architecture is damaged: {error}") from error


def _mixture(section: ArchitectureSection) -> Mixture | None:
    is_mixture = section.family in MIXTURE_FAMILIES
    if not is_mixture:
        return None
    assert section.num_experts is not None and section.experts_per_token is not None
    return Mixture(
        num_experts=section.num_experts,
        experts_per_token=section.experts_per_token,
        normalizes_weights=True,
    )


def has_qkv_bias(family: Family) -> bool:
    """Families with biases on q, k and v, those of HfFamily.bias_key where a config.json is silent."""
    return family in ("qwen2", "qwen2_moe", "glm4", "gpt_oss")


def has_qk_norm(family: Family) -> bool:
    """Families that normalise q and k."""
    names = ("qwen3", "qwen3_moe", "olmo2", "olmo3", "minimax_m2", "gemma3_text", *_HYBRID_FAMILIES)
    return family in names


def divided_head_dim(hidden_size: int, num_attention_heads: int) -> int:
    """hidden_size / num_attention_heads; UserError where the quotient is not whole."""
    if hidden_size % num_attention_heads:
        raise UserError(
            f"hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_attention_heads}; "
            "change one of them, or give head_dim"
        )
    return hidden_size // num_attention_heads


def padded_vocab_size(vocab_size: int, tp: int, *, multiple: int = 1) -> int:
    """Rows of the embedding: the smallest multiple of tp * multiple that is at least vocab_size.

    Each tensor-parallel rank holds the same number of them. TokenDistribution cuts the padded columns off
    before any loss sees the logits and the export cuts the rows, so the amount of padding changes no number;
    rounding further up (64 or 128, for the speed of the matrix product) is the caller's choice.
    """
    step = tp * multiple
    return -(-vocab_size // step) * step


def num_parameters(architecture: Architecture) -> int:
    """Parameters, without vocabulary padding; a tied output layer is counted once."""
    a = architecture
    embedding = a.vocab_size * a.hidden_size
    each = _attention_parameters(a) if a.latent is None else _latent_parameters(a, a.latent)
    num_others = len(a.delta_net.layers) if a.delta_net else 0
    attention = (a.num_layers - num_others) * each
    if a.delta_net is not None:
        attention += num_others * _delta_net_parameters(a, a.delta_net)
    mlp = a.num_layers * 3 * a.hidden_size * a.ffn_hidden_size
    if (mixture := a.mixture) is not None:
        experts = mixture.num_experts * (3 * a.hidden_size * a.ffn_hidden_size + a.hidden_size)
        experts += mixture.num_experts * (mixture.routing == "sigmoid")
        if a.all_biases:
            experts += mixture.num_experts * (1 + 2 * a.ffn_hidden_size + a.hidden_size)
        if mixture.shared_width:
            experts += a.hidden_size * (3 * mixture.shared_width + mixture.shared_is_gated)
        mlp = (a.num_layers - a.num_dense_layers) * experts
        mlp += a.num_dense_layers * 3 * a.hidden_size * mixture.dense_width
    norms = (4 if a.norms == "both" else 2) * a.hidden_size
    ends = embedding * (1 if a.tie_embeddings else 2) + a.hidden_size
    return attention + a.num_layers * norms + mlp + ends


def _attention_parameters(a: Architecture) -> int:
    query_width, key_width = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    count = a.hidden_size * ((2 + a.has_output_gate) * query_width + 2 * key_width)
    count += (query_width + 2 * key_width) if a.qkv_bias else 0
    if a.qk_norm:
        count += (query_width + key_width) if a.qk_norm_spans_heads else 2 * a.head_dim
    return count + a.hidden_size * a.all_biases + a.num_attention_heads * a.has_sinks


def _delta_net_parameters(a: Architecture, net: DeltaNet) -> int:
    small = net.num_key_heads * net.channels_each * net.kernel + 2 * net.num_value_heads + net.value_dim
    return delta_net_matrices(a, net) + small


def delta_net_matrices(a: Architecture, net: DeltaNet) -> int:
    """Elements of the projections of one gated delta net."""
    return a.hidden_size * (net.num_key_heads * net.rows_each + net.num_value_heads * net.value_dim)


def _latent_parameters(a: Architecture, latent: Latent) -> int:
    return latent_matrices(a, latent) + latent.rank + (latent.query_rank or 0)


def latent_matrices(a: Architecture, latent: Latent) -> int:
    """Elements of the projections of one layer's latent attention, without norms."""
    still = a.head_dim - latent.rope_dim
    heads = latent.rank * (still + latent.value_dim) + a.hidden_size * latent.value_dim
    heads += (latent.query_rank or a.hidden_size) * a.head_dim
    down = latent.rank + latent.rope_dim + (latent.query_rank or 0)
    return a.num_attention_heads * heads + a.hidden_size * down
