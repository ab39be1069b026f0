"""A safetensors file written tensor by tensor.

The library's save_file wants all tensors of a file in memory. An export that holds one of them at a time, in
memory that it uses again, is faster by what the pages of the others would cost, and needs less by a file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_sftrl.hf.headers import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


class SafetensorsWriter:
    """An open safetensors file; as a context manager it is closed, and whole unless the block raised.

    Args:
        path: of the file, made new.
        tensors: dtype and shape of each tensor that will be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        # Wide elements first, so that each tensor begins at a multiple of its element's size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._places[name] = (start, end - start)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write_at(memoryview(len(text).to_bytes(8, "little") + text), 0)

    def write(self, name: str, values: Tensor) -> None:
        """Write a tensor, each once and in any order.

        Args:
            name: one of those announced.
            values: CPU, contiguous, of the announced shape and dtype.
        """
        offset, num_bytes = self._places.pop(name)
        assert values.is_contiguous() and values.nbytes == num_bytes, name
        if num_bytes:
            self._write_at(values.detach().view(-1).view(torch.uint8).numpy().data, self._start + offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                assert not self._places, f"never written: {sorted(self._places)}"
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data`; the kernel may take less than it is given (2 GiB at most a call)."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)
