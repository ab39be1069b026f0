"""Copies of a checkpoint's tensors that training does not touch, in host memory that is used again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_sftrl.engine.checkpoint.io import stored_here


class HostCopies:
    """Memory of one copy of what this rank stores, taken at the first copy: new pages cost more than copying.

    torch's own stager (torch.distributed.checkpoint.staging, 2.13) copies the whole storage under a tensor:
    of a sharded optimizer's views, every rank would copy the buffers of all ranks.

    Args:
        device: of the tensors; the memory is pinned where it is CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, tensors: Iterable[ShardedTensor]) -> list[ShardedTensor]:
        """The tensors that this rank stores, with data of their own; the call before loses its.

        Args:
            tensors: any; those that another rank stores are left out.
        """
        copies = []
        for tensor in stored_here(tensors):
            assert tensor.data is not None
            copy = self._place(tensor, tensor.data)
            copies.append(dataclasses.replace(tensor, data=copy.copy_(tensor.data, non_blocking=True)))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies

    def _place(self, tensor: ShardedTensor, data: Tensor) -> Tensor:
        """A storage for each tensor: torch's writer would copy once more what is a part of its storage."""
        key = (tensor.key, tensor.global_offset)
        found = self._memory.get(key)
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
            is_cuda = self._device.type == "cuda"
            found = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=is_cuda)
            self._memory[key] = found
        return found
