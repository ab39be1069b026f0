"""A tensor in a file, and the reading of exactly the bytes of a part of it.

Plain preads instead of a memory map: mapped pages count as this process's memory until the map is closed (the
whole file after one pass), a slice of a mapped tensor is a view that keeps all of it, and a file that is cut
short while it is mapped ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sftrl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a contiguous tensor lies.

    Args:
        file: that holds it.
        offset: of its first byte in the file.
        shape: of the tensor, () for a scalar.
        dtype: as stored.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_part(
    descriptor: int, stored: StoredTensor, part: Sequence[slice] = (), *, out: Tensor | None = None
) -> Tensor:
    """Read a rectangle of a stored tensor.

    Args:
        descriptor: of the open file; its position is neither used nor moved, so threads may share it.
        stored: the tensor.
        part: slices of step 1 of its leading dimensions; those without a slice are read whole.
        out: where to read to, of the part's shape and the stored dtype, contiguous, on the CPU.
    Returns:
        `out`, or without it a [*part] CPU tensor of the stored dtype, contiguous, of its own memory.
    Raises:
        UserError: the file ends before the tensor does.
    """
    whole_part = (*part, *[slice(None)] * (len(stored.shape) - len(part)))
    bounds = [range(size)[piece] for size, piece in zip(stored.shape, whole_part, strict=True)]
    assert all(bound.step == 1 for bound in bounds), "only slices of step 1"
    shape = tuple(len(bound) for bound in bounds)
    result = torch.empty(shape, dtype=stored.dtype) if out is None else out
    assert (tuple(result.shape), result.dtype, result.is_contiguous()) == (shape, stored.dtype, True)
    if result.numel() == 0:
        return result
    buffer = result.view(-1).view(torch.uint8).numpy().data
    done = 0
    for start, length in _runs(stored.shape, bounds):
        num_bytes = length * stored.dtype.itemsize
        _read_into(
            descriptor,
            buffer[done : done + num_bytes],
            stored.offset + start * stored.dtype.itemsize,
            file=stored.file,
        )
        done += num_bytes
    assert done == len(buffer)
    return result


def _runs(shape: tuple[int, ...], bounds: Sequence[range]) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of each contiguous piece of a rectangle, in order."""
    # Trailing dimensions that are read whole join the run of the dimension before them.
    cut = len(shape)
    while cut > 0 and len(bounds[cut - 1]) == shape[cut - 1]:
        cut -= 1
    run_dim = max(cut - 1, 0)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    length = math.prod(len(bound) for bound in bounds[run_dim:])
    offset = bounds[run_dim].start * strides[run_dim] if shape else 0
    for index in itertools.product(*bounds[:run_dim]):
        yield offset + sum(i * stride for i, stride in zip(index, strides, strict=False)), length


def _read_into(descriptor: int, buffer: memoryview, offset: int, *, file: Path) -> None:
    """Fill `buffer` from `offset`; the kernel may give less than asked for (2 GiB at most a call)."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise UserError(
                f"{file} ends at byte {os.fstat(descriptor).st_size}, inside a tensor: it was cut short "
                "while it was open; copy or download it again"
            )
        done += count
