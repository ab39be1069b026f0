"""A sum over the exact bits of a tensor, computed where the tensor lies."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**18
"""Elements at a time: the 64-bit temporaries stay below 8 MiB."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """sum_i (2 i + 1) w_i modulo 2^64 over the elements' bit patterns w_i, in row-major order.

    The factors are odd, so a change of any one element changes the sum; exchanging two different elements
    of at most 32 bits changes it too, because (w_i - w_j) 2 (i - j) is no multiple of 2^64.

    Args:
        tensor: any shape, dtype and device; need not be contiguous.
    Returns:
        A signed 64-bit number.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        words = flat[start : start + _CHUNK].view(_WORDS[tensor.element_size()]).long()
        place = torch.arange(start, start + words.numel(), device=tensor.device)
        total += (words * (2 * place + 1)).sum()
    return int(total)
