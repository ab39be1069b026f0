"""Latent attention (DeepSeek-V3's MLA): keys and values of all heads are made of one vector a token.

Megatron's own (0.16.1) on torch's layers cuts the projections into the small vectors over tp, and then drops
the part of the gradient of the keys' turning dimensions that comes from other ranks' heads: its gather has a
split as backward. Here every rank has these projections whole, as with Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.engine.local_layers import PackedAttention, RMSNorm
from megatron_sftrl.engine.packed_sequences import PackedSequences
from megatron_sftrl.models.architecture import Latent
from megatron_sftrl.models.rope import Rope, inverse_frequencies


class WholeLinear(torch.nn.Module):
    """x W^T with all of W on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, num_columns: int, num_rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(num_rows, num_columns, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # finalize_model_grads sums the gradient over tp where this is set: each rank saw its own tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class LatentAttention(MegatronModule):
    """Queries and keys have parts that turn and parts that do not; the keys' turning part is every head's.

    Args:
        latent: its sizes.
        rope: of the parts that turn.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        latent: Latent,
        rope: Rope,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None and config.kv_channels is not None
        self.layer_number, self.latent, self.pg_collection = layer_number, latent, pg_collection
        self._rope = rope
        frequencies = inverse_frequencies(rope, latent.rope_dim)
        self._frequencies = frequencies.to(torch.cuda.current_device())
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.heads, self.head_dim = heads // pg_collection.tp.size(), config.kv_channels
        self.core_attention = PackedAttention(
            config,
            layer_number,
            AttnMaskType.causal,
            "self",
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        options: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=False, tp_group=pg_collection.tp
        )
        self.linear_proj = RowParallelLinear(
            heads * latent.value_dim, hidden, input_is_parallel=True, skip_bias_add=True, **options
        )
        up = (config.kv_channels - latent.rope_dim) + latent.value_dim
        queries = heads * config.kv_channels
        if latent.query_rank is None:
            self.linear_q_proj = ColumnParallelLinear(hidden, queries, gather_output=False, **options)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden, latent.query_rank)
            self.linear_q_up_proj = ColumnParallelLinear(
                latent.query_rank, queries, gather_output=False, **options
            )
        self.linear_kv_down_proj = WholeLinear(config, hidden, latent.rank + latent.rope_dim)
        self.linear_kv_up_proj = ColumnParallelLinear(latent.rank, heads * up, gather_output=False, **options)
        if latent.query_rank is not None:
            self.q_layernorm = RMSNorm(config, latent.query_rank, latent.norm_eps)
        self.kv_layernorm = RMSNorm(config, latent.rank, latent.norm_eps)

    def forward(
        self,
        hidden_states: Tensor,  # [T, 1, H], under sequence parallelism this rank's share of T
        attention_mask: None = None,
        *,
        packed_seq_params: PackedSequences,
        **_: object,
    ) -> tuple[Tensor, None]:
        """[T, 1, H] or the share of it, and no bias."""
        latent, group = self.latent, self.pg_collection.tp
        if latent.query_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))
        small, turning = self.linear_kv_down_proj(hidden_states).split([latent.rank, latent.rope_dim], dim=-1)
        # Every rank's heads see it: its gradient is a sum over them.
        if self.config.sequence_parallel:
            turning = gather_from_sequence_parallel_region(turning, group=group)
        else:
            turning = copy_to_tensor_model_parallel_region(turning, group=group)
        both, _ = self.linear_kv_up_proj(self.kv_layernorm(small))

        turn = packed_seq_params.turn(self._rope, self._frequencies, self.pg_collection.cp, query.dtype)
        query, key, value = self.heads_of(query, turn(turning), both, turn)
        attended = self.core_attention(query, key, value, None, packed_seq_params=packed_seq_params)
        return self.linear_proj(attended[:, None])

    def heads_of(
        self, query: Tensor, turned_key: Tensor, both: Tensor, turned: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, heads/tp, head_dim] queries and keys, [T, heads/tp, value_dim] values.

        Args:
            query: [T, 1, heads/tp * head_dim].
            turned_key: [T, 1, rope_dim], at its position.
            both: [T, 1, heads/tp * (head_dim - rope_dim + value_dim)].
            turned: turns the last rope_dim dimensions of queries, [T, heads/tp, rope_dim].
        """
        still = self.head_dim - self.latent.rope_dim
        query, both = query.view(len(query), self.heads, -1), both.view(len(both), self.heads, -1)
        query = torch.cat((query[..., :still], turned(query[..., still:])), dim=-1)
        key = torch.cat((both[..., :still], turned_key.expand(-1, self.heads, -1)), dim=-1)
        return query, key, both[..., still:]
