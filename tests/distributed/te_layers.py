"""Transformer Engine's layers as Megatron sees them, in torch: parameters, names, roundings, on any device.

Of Transformer Engine 2.20: a norm multiplies its weight in fp32 and rounds once, LayerNormLinear holds that
weight as layer_norm_weight and an empty tensor for a bias it has not, and with return_layernorm_output gives
what the norm gave beside its own output, before sequence parallelism gathers it; GroupedLinear holds weight0,
weight1, ..., the fused rope computes in fp32, and its attention has none of PackedAttention's attributes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


@contextlib.contextmanager
def layers_like_transformer_engines() -> Iterator[None]:
    """Models that are built inside have Megatron's specification for Transformer Engine, made of torch."""
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    from megatron_sftrl.engine import megatron_config
    from megatron_sftrl.engine.local_layers import BiasedColumnParallelLinear, PackedAttention

    def ones(size: int, config: Any) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))

    class Norm(torch.nn.Module):
        def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
            super().__init__()
            self.eps, self.weight = eps, ones(hidden_size, config)
            self.is_from_zero = config.layernorm_zero_centered_gamma

        def forward(self, x: Tensor) -> Tensor:
            return _norm(x, self.weight.float() + self.is_from_zero, self.eps)

    class NormAndLinear(BiasedColumnParallelLinear):
        def __init__(
            self, input_size: int, output_size: int, *, config: Any, bias: bool, **rest: Any
        ) -> None:
            super().__init__(input_size, output_size, config=config, bias=bias, **rest)
            self.eps, self.layer_norm_weight = config.layernorm_epsilon, ones(input_size, config)
            self.return_layernorm_output = False
            if not bias:
                del self._parameters["bias"]
                self.bias = torch.empty(0, dtype=config.params_dtype)  # type: ignore[assignment]

        def forward(self, input_: Tensor, *_: object, **__: object) -> tuple[Any, None]:
            output = super().forward(input_)[0]
            return (output, self.normed) if self.return_layernorm_output else output, None

        def _forward_impl(self, input: Tensor, weight: Tensor, *_: object, **options: Any) -> Tensor:
            weight_of_norm = self.layer_norm_weight.float() + self.config.layernorm_zero_centered_gamma
            normed = self.normed = _norm(input, weight_of_norm, self.eps)
            if options["sequence_parallel"]:
                normed = gather_from_sequence_parallel_region(normed, group=options["tp_group"])
            return F.linear(normed, weight, options["bias"] if self.bias.numel() else None)

    class Linear(BiasedColumnParallelLinear):
        def __init__(
            self, input_size: int, output_size: int, *, config: Any, bias: bool, **rest: Any
        ) -> None:
            super().__init__(input_size, output_size, config=config, bias=bias, **rest)
            if not bias:
                del self._parameters["bias"]
                self.bias = torch.empty(0, dtype=config.params_dtype)  # type: ignore[assignment]

        def forward(self, input_: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
            return super().forward(input_)[0], None

        def _forward_impl(self, input: Tensor, weight: Tensor, *_: object, **options: Any) -> Tensor:
            return super()._forward_impl(input, weight, **{**options, "bias": self._parameters.get("bias")})

    class GroupedLinear(torch.nn.Module):
        cut_dim = 0

        def __init__(
            self, num_gemms: int, inputs: int, outputs: int, *, config: Any, pg_collection: Any, **_: Any
        ) -> None:
            super().__init__()
            self.groups, shape = pg_collection, [outputs, inputs]
            shape[self.cut_dim] //= pg_collection.expt_tp.size()
            for number in range(num_gemms):
                weight = torch.empty(shape, dtype=config.params_dtype)
                self.register_parameter(f"weight{number}", torch.nn.Parameter(weight))

        def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
            parts = zip(x.split(tokens_per_expert), self.parameters(), strict=True)
            return torch.cat([F.linear(part, weight) for part, weight in parts]), None

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> dict[str, Any]:
            groups, found = self.groups, {}
            num = len([*self.parameters()])
            for number, weight in enumerate(self.parameters()):
                expert = (len(sharded_offsets), groups.ep.rank() * num + number, groups.ep.size() * num)
                name = f"{prefix}weight"
                made = make_sharded_tensors_for_checkpoint(
                    {"weight": weight},
                    prefix,
                    {"weight": self.cut_dim},
                    (*sharded_offsets, expert),
                    tp_group=groups.expt_tp,
                    dp_cp_group=groups.expt_dp,
                )
                found[f"{name}{number}"] = made[name]
            return found

    class GroupedRowLinear(GroupedLinear):
        cut_dim = 1

    class Attention(torch.nn.Module):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            self.kernel = PackedAttention(**arguments)

        def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
            return self.kernel(*tensors, **options)

    with contextlib.ExitStack() as stack:
        for name, layer in {
            "TENorm": Norm,
            "TELayerNormColumnParallelLinear": NormAndLinear,
            "TEColumnParallelLinear": Linear,
            "TERowParallelLinear": RowParallelLinear,
            "TEColumnParallelGroupedLinear": GroupedLinear,
            "TERowParallelGroupedLinear": GroupedRowLinear,
            "TEDotProductAttention": Attention,
            "is_te_min_version": lambda _: True,
        }.items():
            stack.enter_context(mock.patch.object(provider, name, layer))
        for module, name, value in (
            (gpt_layer_specs, "TESpecProvider", provider.TESpecProvider),
            (transformer_block, "LayerNormImpl", Norm),
            (rope_utils, "fused_apply_rotary_pos_emb_thd", _fused_rope),
            (megatron_config, "uses_transformer_engine", lambda *_, **__: True),
        ):
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        yield


def copy_into_fused_layers(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """The weights of a chunk of torch's layers, to the same chunk of these; every one of them is written."""
    ours = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            head, _, last = name.rpartition(".")
            if name.endswith("linear_qkv.layer_norm_weight"):
                name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
            elif name.endswith("linear_fc1.layer_norm_weight"):
                name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            elif ".experts." in name:
                expert = f".experts.local_experts.{last.removeprefix('weight')}."
                name = head.replace(".experts.", expert) + ".weight"
            parameter.copy_(ours.pop(name))
    assert not ours, f"no place for {sorted(ours)}"


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def _fused_rope(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *, cp_size: int, cp_rank: int) -> Tensor:
    assert (cp_size, cp_rank) == (1, 0)
    lengths = cu_seqlens.diff().tolist()
    angles = freqs[torch.cat([torch.arange(length) for length in lengths]), 0].float()  # [T, 1, head_dim]
    part, still = t.float().tensor_split([angles.shape[-1]], dim=-1)
    first, second = part.chunk(2, dim=-1)
    turned = part * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return torch.cat((turned, still), dim=-1).to(t.dtype)
