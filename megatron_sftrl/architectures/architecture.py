"""The sizes and switches of a decoder-only transformer, independent of any training library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sftrl.config.schema import ArchitectureSection

Family = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A pre-norm transformer with RMSNorm, rotary positions, grouped-query attention and a SwiGLU MLP.

    Args:
        family: block layout; names the table of parameter names.
        num_layers: blocks.
        hidden_size: H, width of the residual stream.
        ffn_hidden_size: width of the gated MLP.
        num_attention_heads: query heads.
        num_query_groups: key/value heads.
        head_dim: width of one head; heads * head_dim need not be H.
        vocab_size: V, before padding for tensor parallelism.
        max_position_embeddings: longest sequence, tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling_factor: Llama 3.1 frequency scaling (low 1, high 4, original length 8192); None for none.
        norm_eps: added to the variance in RMSNorm.
        tie_embeddings: the output layer is the embedding.
        qkv_bias: q, k and v projections have biases.
        qk_norm: RMSNorm over each head of q and k.
        init_std: standard deviation of random weights.
    Raises:
        ValueError: sizes that cannot form a network.
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
    rope_theta: float
    rope_scaling_factor: float | None
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    init_std: float

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_query_groups = {self.num_query_groups}: every group serves as many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions need an even number")


def from_section(section: ArchitectureSection) -> Architecture:
    """The architecture that explicit sizes describe.

    Raises:
        ValueError: a width that the heads do not divide, heads that the groups do not divide.
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
        rope_theta=section.rope_theta,
        rope_scaling_factor=None,
        norm_eps=section.norm_eps,
        tie_embeddings=section.tie_embeddings,
        qkv_bias=has_qkv_bias(section.family),
        qk_norm=has_qk_norm(section.family),
        init_std=section.init_std,
    )


def has_qkv_bias(family: Family) -> bool:
    """Qwen2 is the family with biases on q, k and v."""
    return family == "qwen2"


def has_qk_norm(family: Family) -> bool:
    """Qwen3 is the family that normalises each head of q and k."""
    return family == "qwen3"


def divided_head_dim(hidden_size: int, num_attention_heads: int) -> int:
    """hidden_size / num_attention_heads.

    Raises:
        ValueError: the quotient is not whole.
    """
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_attention_heads}; "
            "change one of them, or give head_dim"
        )
    return hidden_size // num_attention_heads


def padded_vocab_size(vocab_size: int, tp: int, *, multiple: int = 1) -> int:
    """Rows of the embedding so that each tensor-parallel rank holds the same number of them.

    Only the tp size forces padding. TokenDistribution cuts the padded columns off before any loss sees
    the logits and the export cuts the rows, so the amount of padding changes no number; rounding further
    up (64 or 128, for the speed of the matrix product) is the caller's choice.

    Args:
        vocab_size: V, tokens.
        tp: tensor parallel size.
        multiple: each rank's share is a multiple of it.
    Returns:
        The smallest multiple of tp * multiple that is at least vocab_size.
    """
    step = tp * multiple
    return -(-vocab_size // step) * step


def num_parameters(architecture: Architecture) -> int:
    """Trainable parameters, without vocabulary padding; a tied output layer is counted once."""
    a = architecture
    embedding = a.vocab_size * a.hidden_size
    query_width, key_width = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = a.hidden_size * (2 * query_width + 2 * key_width)
    attention += (query_width + 2 * key_width) if a.qkv_bias else 0
    attention += 2 * a.head_dim if a.qk_norm else 0
    mlp = 3 * a.hidden_size * a.ffn_hidden_size
    norms = 2 * a.hidden_size
    ends = embedding * (1 if a.tie_embeddings else 2) + a.hidden_size
    return a.num_layers * (attention + mlp + norms) + ends
