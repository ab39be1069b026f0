"""Other people's output layer and cross-entropy in one, each with the reason why it cannot run here."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch.distributed as dist
from torch import Tensor

TokenMean = Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One of them.

    Args:
        module: what has to be importable.
        if_missing: the reason where it is not.
        needs_cuda: "" where it runs on the CPU, else what of it does not.
        is_interpretable: with TRITON_INTERPRET=1 it runs on the CPU all the same.
        is_vocab_parallel: the weight may be a shard of a tensor-parallel group's.
        token_mean: of hidden states [T, H], weight [V, H], labels [T] and the group; its gradient is that
            of both.
    """

    module: str
    if_missing: str
    needs_cuda: str = ""
    is_interpretable: bool = False
    is_vocab_parallel: bool = False
    token_mean: TokenMean


def why_not(name: str, *, device_type: str, tp: int) -> str | None:
    """The reason why a kernel is not offered; None where it may be tried."""
    kernel = KERNELS[name]
    if not _is_installed(kernel.module):
        return kernel.if_missing
    if tp > 1 and not kernel.is_vocab_parallel:
        return "one process only"
    is_interpreted = kernel.is_interpretable and os.environ.get("TRITON_INTERPRET") == "1"
    if kernel.needs_cuda and device_type != "cuda" and not is_interpreted:
        return f"{kernel.needs_cuda} need CUDA"
    return None


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _megatron(hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    function = importlib.import_module(MEGATRON).linear_cross_entropy
    return function(hidden, weight, labels, tp_group=group, reduction="mean").squeeze()


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    function = importlib.import_module(
        "liger_kernel.transformers.functional"
    ).liger_fused_linear_cross_entropy
    return function(hidden, weight, labels, reduction="mean")


def _cut(implementation: str) -> TokenMean:
    def token_mean(hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return function(hidden, weight, labels, reduction="mean", impl=implementation)

    return token_mean


MEGATRON = "megatron.core.fusions.fused_linear_cross_entropy"

KERNELS = {
    "megatron linear": Kernel(
        module=MEGATRON,
        if_missing=f"megatron-core {version('megatron-core')} has none",
        needs_cuda="its CUTLASS kernels",
        is_vocab_parallel=True,
        token_mean=_megatron,
    ),
    "liger": Kernel(
        module="liger_kernel",
        if_missing="not installed: pip install liger-kernel",
        needs_cuda="its Triton kernels",
        is_interpretable=True,
        token_mean=_liger,
    ),
    "cut-cross-entropy": Kernel(
        module="cut_cross_entropy",
        if_missing="not installed: pip install cut-cross-entropy",
        needs_cuda="its Triton kernels",
        token_mean=_cut("cce"),
    ),
    "cut-cross-entropy, compiled": Kernel(
        module="cut_cross_entropy",
        if_missing="not installed: pip install cut-cross-entropy",
        token_mean=_cut("torch_compile"),
    ),
}
