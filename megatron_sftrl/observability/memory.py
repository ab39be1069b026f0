"""The most memory a process has held."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

_M_MMAP_THRESHOLD = -3  # malloc.h


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far.

    Args:
        device: CUDA: tensors allocated on it since the last `reset_peak_memory`. CPU: the largest
            resident set of the process since it began.
    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def reset_peak_memory(device: torch.device) -> None:
    """Start a new CUDA peak; the CPU's cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def return_freed_memory() -> None:
    """Let glibc give freed tensors back to the system at once; does nothing where there is no glibc.

    It keeps blocks below 32 MiB otherwise, and a tool that goes through a model tensor by tensor would hold
    some hundred megabytes that it does not use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
