"""The machine that a plan is made for: stated rates and assumptions, nothing is looked up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from megatron_sftrl.errors import UserError
from megatron_sftrl.planning.activations import Kernels

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """GPUs in nodes; the defaults are an H100 SXM with one 400 Gbit/s port a GPU.

    Args:
        gpu_memory: bytes of one GPU.
        reserve: of them for CUDA, cuBLAS and NCCL, and for what the allocator cannot use, bytes.
        gpus_per_node: joined by NVLink.
        peak_flops: of one GPU on dense bf16 matrices, per second.
        nvlink, network, host_link: bytes per second of one GPU in one direction: inside the node, between
            nodes, to the memory of the host.
        memory_bandwidth: of the GPU, bytes per second.
        efficiency: share of peak_flops and memory_bandwidth that kernels reach.
        link_efficiency: share of the links' rates that collectives reach.
        kernels: whose layers run.
    Raises:
        UserError: a rate or size that is not positive, an efficiency above 1.
    """

    gpu_memory: float
    reserve: float = 6e9
    gpus_per_node: int = 8
    peak_flops: float = 989e12
    nvlink: float = 450e9
    network: float = 50e9
    host_link: float = 10e9
    memory_bandwidth: float = 3.35e12
    efficiency: float = 0.6
    link_efficiency: float = 0.8
    kernels: Kernels = "transformer_engine"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "kernels":
                continue
            most = 1.0 if "efficiency" in field.name else math.inf
            if not 0 < value <= most:
                limits = "between 0 and 1" if most == 1 else "above 0"
                raise UserError(f"{field.name.replace('_', ' ')}: expected a number {limits}, got {value}")

    def link(self, *, stride: int, size: int) -> float:
        """Bytes per second in a group of `size` ranks that stand `stride` apart: of its slowest link."""
        is_inside = stride * size <= self.gpus_per_node
        return (self.nvlink if is_inside else self.network) * self.link_efficiency


def parse_bytes(text: str) -> float:
    """Bytes of "80GB" (10^9 each) or "80GiB" (2^30 each).

    Raises:
        UserError: no number with a unit, or nothing at all.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"expected a size such as 80GB or 80GiB, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]
