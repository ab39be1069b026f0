"""The three matrix products of an output layer, each by the fastest means that PyTorch has for it.

    logits              hidden @ weight.T                   [T, H] x [H, V]
    hidden's gradient   gradient @ weight                   [T, V] x [V, H]
    weight's gradient   total += gradient.T @ hidden        [V, T] x [T, H]

On a CPU, PyTorch gives fp32 products to MKL, which on AMD's processors has half the speed of oneDNN (logits
of 208 tokens, 151,936 columns, H 1024, two cores of a Zen 5: 1.8 against 0.8 ms a token). oneDNN is a part of
PyTorch, this operator of it is the one that TorchInductor takes, and both sum in fp32.
`torch.backends.mkldnn.flags(enabled=False)` gives everything to `torch.mm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiply-adds from which on oneDNN is the faster one, and the preparation of a new shape is worth while.
_ONEDNN_FROM = 2**20

# Columns that a CPU makes at a time: results that stay in cache until they are where they belong.
_CPU_COLUMNS = 1024

# Columns of the weight's gradient that are made at a time where it has another dtype than its factors.
_MIXED_COLUMNS = 16_384


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[n, m] rows @ weight.T + bias without gradient; rows [n, k], weight [m, k], bias [m], of one dtype."""
    if _takes_onednn(rows, weight):
        return _onednn_linear(rows, weight, bias)
    return F.linear(rows, weight, bias)


def write_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T; hidden [T, H], weight [V_local, H], out [T, V_local], all of one dtype."""
    if hidden.is_cuda:
        torch.mm(hidden, weight.t(), out=out)
        return
    for some, part in zip(weight.split(_CPU_COLUMNS), out.split(_CPU_COLUMNS, dim=1), strict=True):
        if _takes_onednn(hidden, some):
            part.copy_(_onednn_linear(hidden, some))
        else:
            torch.mm(hidden, some.t(), out=part)


def hidden_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """[T, H] gradient @ weight; gradient [T, V_local], weight [V_local, H], of one dtype."""
    return linear(gradient, weight.t())


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient.T @ hidden, summed in the dtype of `total` (fp32 where Megatron keeps gradients).

    Args:
        total: [V_local, H].
        gradient: [T, V_local], of the logits.
        hidden: [T, H] in the gradient's dtype.
    """
    if total.dtype != gradient.dtype:
        _add_mixed(total, gradient, hidden)
    elif _takes_onednn(gradient.t(), hidden.t()):
        turned = hidden.t().contiguous()
        for some, part in zip(gradient.split(_CPU_COLUMNS, dim=1), total.split(_CPU_COLUMNS), strict=True):
            part.add_(_onednn_linear(some.t(), turned))
    else:
        total.addmm_(gradient.t(), hidden)


def _add_mixed(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    for some, part in zip(gradient.split(_MIXED_COLUMNS, dim=1), total.split(_MIXED_COLUMNS), strict=True):
        if gradient.is_cuda:
            part.add_(torch.mm(some.t(), hidden, out_dtype=total.dtype))
        else:
            part.add_(some.t().to(total.dtype) @ hidden.to(total.dtype))


def _takes_onednn(rows: Tensor, weight: Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and len(rows) * weight.numel() >= _ONEDNN_FROM
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
