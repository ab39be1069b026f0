"""Queries and keys turned to their positions: the tables of a micro-batch are made once for all layers.

For torch's layers, latent attention and new tokens. Megatron's own rotation takes the cosines twice in each
layer, asks the device where sequences begin, and keeps tables for each backward; it stays where Transformer
Engine's kernel does the work. The bits are Megatron's, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sftrl.models.rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """Where T tokens stand, in layers of one rope.

    Args:
        cos, sin: [T, turning dimensions], times the rope's attention factor; the sine has the sign with which
            the other dimension of a pair is added.
        is_interleaved: neighbours are a pair; else dimensions that are half of the turning ones apart.
    """

    cos: Tensor
    sin: Tensor
    is_interleaved: bool

    @classmethod
    def of(cls, rope: Rope, frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Turn:
        """For tokens at `positions` [T].

        Args:
            frequencies: inverse_frequencies() of the rope, [turning dimensions / 2] fp32.
            dtype: of the tables, made in fp32.
        """
        angles = torch.outer(positions.float(), frequencies)
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        if rope.interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cls(cos=cos.to(dtype), sin=sin.to(dtype), is_interleaved=rope.interleaved)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, ..., head_dim], its first dimensions turned, in its own dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Turned.apply(x, self)
        return self.turned(x, self.sin)

    def turned(self, x: Tensor, sin: Tensor) -> Tensor:
        """With its own sine; with that of the other sign, back."""
        if (num := self.cos.shape[-1]) < x.shape[-1]:
            return torch.cat((self.turned(x[..., :num], sin), x[..., num:]), dim=-1)
        shape = (len(x), *(1,) * (x.dim() - 2), num)
        other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if self.is_interleaved else x.roll(num // 2, -1)
        return (x * self.cos.view(shape)).add_(other * sin.view(shape)).to(x.dtype)


class _Turned(torch.autograd.Function):
    """Its gradient is turned back; only the tables are kept, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Turn) -> Tensor:
        ctx.turn = turn
        return turn.turned(x, turn.sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.turn.turned(grad, -ctx.turn.sin), None
