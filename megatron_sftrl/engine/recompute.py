"""What is kept for a backward where Megatron keeps more than it needs: gates, and recomputation it lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.config.checks import recomputed_modules
from megatron_sftrl.config.schema import TrainSection


def own_modules(*, with_te: bool) -> tuple[str, ...]:
    """Of train.recompute_modules those that are recomputed here, not by Megatron (0.16.1, 0.19.2).

    Its moe_act is one of grouped experts, which only Transformer Engine's layers have.
    """
    return ("mlp_act",) if with_te else ("mlp_act", "moe_act")


def complete_recomputation(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig, train: TrainSection
) -> None:
    """Add to a policy's chunks what train.recompute asks for and Megatron's configuration does not do.

    Without train.recompute a gate that is not fused keeps as little as a fused one, to the same bits.
    """
    with_te = config.transformer_impl == "transformer_engine"
    modules = recomputed_modules(train, is_mixture=config.num_moe_experts is not None, with_te=with_te)
    forgets = not set(own_modules(with_te=with_te)).isdisjoint(modules)
    spares = not config.bias_activation_fusion
    for chunk in chunks:
        if config.recompute_method == "block" and config.moe_aux_loss_coeff:
            assert config.recompute_num_layers is not None
            _KeptBlocks(chunk.decoder, config.recompute_num_layers)
        for module in chunk.modules():
            # Megatron names the class of an expert's MLP itself, so that no spec could ask for another one.
            if (forgets or spares) and type(module) is MLP:
                module.__class__ = ForgetfulMLP if forgets else LeanMLP
                if forgets and config.fp8:
                    # Else fc2 keeps its input in eight bits, and what is made again would serve nothing.
                    from megatron.core.extensions.transformer_engine import set_save_original_input

                    set_save_original_input(module.linear_fc2)


class LeanMLP(MLP):
    """Megatron's MLP, which keeps of a gate fc1's output and its own alone: [T, 3 F/tp] instead of 5 F/tp."""

    forgets = False

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: object) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, per_token_scale)
        both, bias = self.linear_fc1(hidden_states)
        both = both if bias is None else both + bias
        if self.forgets:
            checkpoint = CheckpointWithoutOutput()
            output, bias = self.linear_fc2(checkpoint.checkpoint(self._activated, both, per_token_scale))
            # fc2 has saved its input, whose memory comes back before its backward.
            checkpoint.discard_output_and_register_recompute(output)
        else:
            output, bias = self.linear_fc2(self._activated(both, per_token_scale))
        if bias is not None and per_token_scale is not None:
            output, bias = output + (bias * per_token_scale.unsqueeze(-1)).to(output.dtype), None
        return output, bias

    def _activated(self, both: Tensor, per_token_scale: Tensor | None) -> Tensor:
        """Gate (first half) * second half, times the router's weight of each token, as Megatron does it."""
        scale = None if per_token_scale is None else per_token_scale.unsqueeze(-1)
        limit = self.config.activation_func_clamp_value
        if self.config.bias_activation_fusion:
            if scale is None:
                return bias_swiglu_impl(both, None)
            return weighted_bias_swiglu_impl(both, None, scale)
        activation = self.config.activation_func
        if activation in BACKWARDS and not self.config.glu_linear_offset and limit is None:
            product = gated(both, activation)
        else:
            gate, linear = both.chunk(2, dim=-1)
            if limit is not None:
                gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
            product = activation(gate) * (linear + self.config.glu_linear_offset)
        return product if scale is None else (product * scale).to(product.dtype)


class ForgetfulMLP(LeanMLP):
    """Megatron's MLP, which keeps fc1's output alone: [T, 2 F/tp] instead of 3 to 6 F/tp."""

    forgets = True


def gelu_tanh(gate: Tensor) -> Tensor:
    """GELU by its approximation with a tanh."""
    return F.gelu(gate, approximate="tanh")


BACKWARDS: dict[Any, Callable[..., Tensor]] = {
    F.silu: torch.ops.aten.silu_backward.grad_input,
    gelu_tanh: partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
}
"""By activation, the gradient of its input from that of its output, written to `grad_input`."""


def gated(both: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(first half) * second half, [T, 2 F/tp] -> [T, F/tp]: autograd's bits, without its copies.

    Megatron's function for SwiGLU rounds each step of its backward where nothing compiles it.
    """
    return _Gated.apply(both, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        gate, linear = both.chunk(2, dim=-1)
        return activation(gate).mul_(linear)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        gate, linear = both.chunk(2, dim=-1)
        grads = torch.empty_like(both)
        gate_grad, linear_grad = grads.chunk(2, dim=-1)
        torch.mul(grad, linear, out=linear_grad)
        BACKWARDS[ctx.activation](linear_grad, gate, grad_input=gate_grad)
        torch.mul(grad, ctx.activation(gate), out=linear_grad)
        return grads, None


class _KeptBlocks:
    """Tells the blocks of one decoder that are not recomputed which tokens are padding.

    Where the others are, Megatron (0.16.1) leaves the mask out here, and routers would balance padding, too.
    """

    def __init__(self, decoder: Any, num_recomputed: int) -> None:
        self._mask: Tensor | None = None
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer in decoder.layers[num_recomputed:]:
            layer.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _begin(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("padding_mask")

    def _tell(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "padding_mask": self._mask}
