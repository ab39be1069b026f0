"""A safetensors file written tensor by tensor.

The library's save_file wants all tensors of a file in memory. An export that holds one of them at a time, in
memory that it uses again, is faster by what the pages of the others would cost, and needs less by a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_sftrl.hf.direct_file import new_direct_file
from megatron_sftrl.hf.headers import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file and force it to the disk.

    Args:
        path: of the file, made new.
        kinds: dtype and shape of each tensor.
        tensor: makes the tensor of a name, on the CPU and contiguous; asked once for each, in the order of
            the file, and done with the one before, whose memory it may use again.
    Raises:
        OSError: the file cannot be written.
    """
    # Wide elements first, so that each tensor begins at a multiple of its element's size.
    names = sorted(kinds, key=lambda name: -kinds[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with new_direct_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = tensor(name)
            assert (values.dtype, tuple(values.shape), values.is_contiguous()) == (*kinds[name], True), name
            file.write(values.detach().view(-1).view(torch.uint8).numpy().data)
