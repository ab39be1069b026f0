"""Gated delta net: a matrix a head in place of keys and values, which each token corrects (arXiv:2412.06464).

Of a head at token t, with decay g <= 0, learning rate b in (0, 1) and q, k of length 1:

    S_t = e^g S_{t-1} + k (b (v - k^T e^g S_{t-1}))^T        output: q^T S_t / sqrt(key_dim)

Megatron's own (0.16.1) runs with flash-linear-attention alone and knows neither packed sequences nor
generation. Its rows are cut over tp by key heads, so that a rank's conv, heads and gates are its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_sftrl.engine.kv_cache import CacheSlots
from megatron_sftrl.engine.local_layers import rms_norm
from megatron_sftrl.engine.packed_sequences import PackedSequences
from megatron_sftrl.models.architecture import DELTA_CHUNK, DeltaNet

_LENGTH_EPS = 1e-6
CONVOLUTION, MATRICES = "convolution", "matrices"
"""What a cache keeps of a sequence: the last inputs of the convolution, and the heads' matrices."""

Heads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Queries, keys, values, decays and rates."""


class OutputNorm(torch.nn.Module):
    """weight * x / rms(x) * silu(gate) over each head, rounded once.

    The weight is every rank's, the heads are not.
    """

    def __init__(self, config: TransformerConfig, width: int, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, group
        self.weight = torch.nn.Parameter(
            torch.ones(width, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.group)
        return (rms_norm(x, weight, self.eps) * F.silu(gate.float())).to(x.dtype)


class GatedDeltaNet(MegatronModule):
    """Takes attention's place in a layer; `net` says its sizes."""

    A_log: Tensor
    dt_bias: Tensor
    conv_weight: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        net: DeltaNet,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.layer_number, self.net, self.pg_collection = layer_number, net, pg_collection
        tp, hidden = pg_collection.tp.size(), config.hidden_size
        self.key_heads = net.num_key_heads // tp
        values = net.num_value_heads // tp
        for name, shape in (
            ("A_log", (values,)),
            ("dt_bias", (values,)),
            ("conv_weight", (self.key_heads * net.channels_each, 1, net.kernel)),
        ):
            zeros = torch.zeros(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.register_parameter(name, torch.nn.Parameter(zeros))
            set_tensor_model_parallel_attributes(getattr(self, name), True, 0, 1)
        options: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=False, tp_group=pg_collection.tp
        )
        width = net.num_value_heads * net.value_dim
        self.linear_proj = RowParallelLinear(
            width, hidden, input_is_parallel=True, skip_bias_add=True, **options
        )
        self.in_proj = ColumnParallelLinear(
            hidden, net.num_key_heads * net.rows_each, gather_output=False, **options
        )
        self.out_norm = OutputNorm(config, net.value_dim, pg_collection.tp)

    def forward(
        self,
        hidden_states: Tensor,  # [T, 1, H], under sequence parallelism this rank's share of T
        attention_mask: None = None,
        *,
        packed_seq_params: PackedSequences,
        **_: object,
    ) -> tuple[Tensor, None]:
        """[T, 1, H] or the share of it, and no bias."""
        packed = packed_seq_params
        projected, _ = self.in_proj(hidden_states)
        mixed, gate, rate, time = self._parts(projected[:, 0])
        heads = self._heads(self._convolved(mixed, packed), rate, time)
        kernel = _kernel_of_fla(projected)
        rule: Rule = _by_groups if kernel is None else kernel
        attended = rule(heads, packed, self._keeps(packed.places))
        return self.linear_proj(self.out_norm(attended, gate).flatten(1)[:, None])

    def step(self, projected: Tensor, places: CacheSlots) -> Tensor:
        """What linear_proj is given for one new token of each cached sequence; moves their states on.

        Args:
            projected: [T, key heads/tp * rows_each] by in_proj, of which `places.span` are the first.
        Returns:
            [T, value heads/tp * value_dim], 0 in the others.
        """
        assert places.span is not None
        num = places.span[1] - places.span[0]
        if num == 0:  # a pipeline has more micro-batches than responses are left
            return projected.new_zeros(len(projected), len(self.A_log) * self.net.value_dim)
        mixed, gate, rate, time = self._parts(projected[:num])
        before = places.cache.state(self.layer_number, CONVOLUTION, places)
        window = torch.cat((before, mixed[:, None]), dim=1)  # [S, kernel, channels/tp]
        before.copy_(window[:, 1:])
        mixed = F.silu(F.conv1d(window.mT, self.conv_weight, groups=window.shape[2])[..., 0])
        query, key, value, decay, rate = self._heads(mixed, rate, time)
        query, key = _unit(query) / self.net.key_dim**0.5, _unit(key)
        matrices = places.cache.state(self.layer_number, MATRICES, places)
        matrices.mul_(decay.exp()[..., None, None])
        correction = (value.float() - (matrices * key[..., None]).sum(-2)) * rate.float()[..., None]
        matrices.add_(key[..., None] * correction[..., None, :])
        attended = (matrices * query[..., None]).sum(-2).to(projected.dtype)
        output = self.out_norm(attended, gate).flatten(1)
        return F.pad(output, (0, 0, 0, len(projected) - num))

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[T, channels/tp] for the convolution, [T, heads/tp, value_dim] gates, twice [T, heads/tp]."""
        net, each = self.net, self.net.value_heads_each
        by_head = projected.view(len(projected), self.key_heads, net.rows_each)
        mixed, gate, rate, time = by_head.split([net.channels_each, each * net.value_dim, each, each], dim=-1)
        gate = gate.reshape(len(projected), -1, net.value_dim)
        return mixed.flatten(1), gate, rate.flatten(1), time.flatten(1)

    def _convolved(self, mixed: Tensor, packed: PackedSequences) -> Tensor:
        """[T, channels/tp], each sequence on its own: zeros stand before it."""
        gap = self.net.kernel - 1
        rows = packed.rows_with_gaps(gap, mixed.device)
        spread = mixed.new_zeros(len(mixed) + gap * len(packed.lengths), mixed.shape[1])
        spread = spread.index_copy(0, rows, mixed)
        if (places := packed.places) is not None:
            last = packed.cu_seqlens_q[1:].long() - 1  # type: ignore[index]
            inputs = rows[last, None] + torch.arange(1 - gap, 1, device=rows.device)
            places.cache.write_state(self.layer_number, CONVOLUTION, places.slots[last], spread[inputs])
        convolved = F.conv1d(spread.mT[None], self.conv_weight, groups=mixed.shape[1])
        return F.silu(convolved[0].mT[rows - gap])

    def _heads(self, mixed: Tensor, rate: Tensor, time: Tensor) -> Heads:
        """Queries, keys [T, heads/tp, key_dim], values [T, heads/tp, value_dim], decays (fp32) and rates."""
        net, each = self.net, self.net.value_heads_each
        by_head = mixed.view(len(mixed), self.key_heads, net.channels_each)
        query, key, value = by_head.split([net.key_dim, net.key_dim, each * net.value_dim], dim=-1)
        query, key = (x.repeat_interleave(each, dim=1) for x in (query, key))
        decay = -self.A_log.float().exp() * F.softplus(time.float() + self.dt_bias)
        return query, key, value.reshape(len(mixed), -1, net.value_dim), decay, rate.sigmoid()

    def _keeps(self, places: CacheSlots | None) -> Callable[[Tensor, Tensor], None] | None:
        """What is told the last matrices of sequences, by their first rows; None in training."""
        if places is None:
            return None
        return lambda rows, matrices: places.cache.write_state(
            self.layer_number, MATRICES, places.slots[rows], matrices
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Its own parameters are cut over tensor-parallel ranks, too."""
        own = dict(self.named_parameters(recurse=False))
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | (
            make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                dict.fromkeys(own, 0),
                sharded_offsets,
                tp_group=self.pg_collection.tp,
                dp_cp_group=(metadata or {}).get("dp_cp_group"),
            )
        )


# The rule over whole sequences: [T, heads/tp, value_dim] of packed tokens.


Keep = Callable[[Tensor, Tensor], None]
Rule = Callable[[Heads, PackedSequences, Keep | None], Tensor]


def _kernel_of_fla(like: Tensor) -> Rule | None:
    """flash-linear-attention's kernel, where it is installed and the tensors are on a GPU."""
    if not like.is_cuda or importlib.util.find_spec("fla") is None:
        return None
    kernel = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def rule(heads: Heads, packed: PackedSequences, keep: Keep | None) -> Tensor:
        query, key, value, decay, rate = heads
        starts: Any = packed.cu_seqlens_q
        output, matrices = kernel(
            query[None],
            key[None],
            value[None],
            g=decay[None],
            beta=rate[None],
            initial_state=None,
            output_final_state=keep is not None,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=starts.long(),
        )
        if keep is not None:
            keep(starts[:-1].long(), matrices)
        return output[0].to(value.dtype)

    return rule


def _by_groups(heads: Heads, packed: PackedSequences, keep: Keep | None) -> Tensor:
    """Sequences of similar length together, filled up to the longest."""
    query, key, value, decay, rate = heads
    plan = packed.plan(cp_rank=0, cp_size=1, window=None, like=query)
    outputs = []
    for call in plan.calls:
        decays, rates = decay[call.queries], rate[call.queries].float()
        if keep is not None:
            # What fills a sequence up repeats its last row, and must leave the matrix as it is.
            fills = F.pad(call.queries.diff(dim=1) == 0, (1, 0))[..., None]
            decays, rates = decays.masked_fill(fills, 0), rates.masked_fill(fills, 0)
        each, matrices = delta_rule(
            query[call.queries], key[call.queries], value[call.queries], decays, rates
        )
        outputs.append(each.flatten(0, 1).to(value.dtype))
        if keep is not None:
            keep(call.queries[:, 0], matrices)
    return torch.cat(outputs)[plan.back]


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """S sequences of L tokens, computed in fp32.

    Within a chunk the corrections depend on each other by a triangular system; what its tokens read of
    earlier chunks, and leave for later ones, are products with the matrix between the chunks.

    Args:
        query, key: [S, L, heads, key_dim].
        value: [S, L, heads, value_dim].
        decay, rate: [S, L, heads].
    Returns:
        [S, L, heads, value_dim] fp32 outputs, and [S, heads, key_dim, value_dim] fp32 matrices at the end.
    """
    length, size = query.shape[1], min(DELTA_CHUNK, query.shape[1])

    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x.float().transpose(1, 2), (*(0, 0) * (x.dim() - 3), 0, -length % size))
        return x.unflatten(2, (-1, size))  # [S, heads, chunks, tokens, ...]

    query, key = chunks(_unit(query) * query.shape[-1] ** -0.5), chunks(_unit(key))
    value, total, rate = chunks(value), chunks(decay).cumsum(-1), chunks(rate)[..., None]
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    since_start, to_end = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
    system = (key * rate) @ key.mT * between
    sides = torch.cat((value * rate, key * rate * since_start), dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    fresh, read = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    parts = (fresh, read, query @ key.mT * between, query * since_start, key * to_end)
    matrix = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for number, (new, old, within, asked, kept) in enumerate(zip(*(x.unbind(2) for x in parts), strict=True)):
        corrections = new - old @ matrix
        outputs.append(asked @ matrix + within @ corrections)
        matrix = matrix * total[:, :, number, -1].exp()[..., None, None] + kept.mT @ corrections
    return torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2), matrix


def _unit(x: Tensor) -> Tensor:
    """fp32 vectors of length 1."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _LENGTH_EPS)
