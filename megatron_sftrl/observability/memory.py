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
        device: CUDA: tensors allocated on it since the last `take_device_peak`. CPU: the largest
            resident set of the process since it began.
    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def take_device_peak(device: torch.device) -> int:
    """Most bytes of a CUDA device in use since the last call, whoever took them; counting starts anew.

    Between calls only torch's allocator may take memory and give it back. What others hold (contexts, NCCL,
    the share of a sleeping engine that torch still counts as taken) is counted as it is now.
    """
    free, total = torch.cuda.mem_get_info(device)
    beyond_now = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return total - free + beyond_now


def return_freed_memory() -> None:
    """Let glibc give freed tensors back to the system at once; does nothing where there is no glibc.

    It keeps blocks below 32 MiB otherwise, and a tool that goes through a model tensor by tensor would hold
    some hundred megabytes that it does not use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
