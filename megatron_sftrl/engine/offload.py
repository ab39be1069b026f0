"""What training needs between two steps, out of the device's memory while something else generates there.

Gradients are not kept: every step starts with empty ones. The optimizer's state waits in CPU memory. Storages
are emptied and filled in place, so every view of them (Megatron's buckets, the optimizer's shards, a
checkpoint's tensors) is good again afterwards. Megatron's own MegatronOptimizer.offload_to_cpu (0.16.1) puts
new tensors in their place instead: weights that optimizer and model share in fp32 would leave with the state,
and come back as copies that the model never sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_sftrl.engine.optimizer import leaves


class TrainingState:
    """Gradients and optimizer state of one model on this rank: on the device, or away.

    Args:
        wrapped: the model's chunks in Megatron's DDP, whose weights stay where they are.
        optimizer: of these chunks.
        device: where both belong; on the CPU "away" is another place in the same memory.
    """

    def __init__(
        self, wrapped: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, device: torch.device
    ) -> None:
        self._wrapped, self._optimizer, self._device = wrapped, optimizer, device
        self._away: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] | None = None

    @property
    def is_away(self) -> bool:
        """The device does not hold it."""
        return self._away is not None

    def leave(self) -> None:
        """Drop the gradients and move the optimizer's state to CPU memory, pinned where there is CUDA."""
        assert self._away is None, "the training state is away already"
        # Some hold views of the gradients, which nobody may read from now on.
        self._optimizer.zero_grad()
        for chunk in self._wrapped:
            chunk.offload_grad_buffers(empty_cache=False)
        is_cuda = self._device.type == "cuda"
        self._away = []
        for storage in self._storages():
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=is_cuda)
            self._away.append((storage, copy.untyped_storage().copy_(storage, non_blocking=True)))
        if is_cuda:
            torch.cuda.synchronize(self._device)
        for storage, _ in self._away:
            storage.resize_(0)
        if is_cuda:
            # The engine takes its memory from the driver, not from torch's cache.
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        """Bring the optimizer's state back, bit for bit, and make room for gradients, which are 0."""
        assert self._away is not None, "the training state is here already"
        for storage, copy in self._away:
            storage.resize_(copy.nbytes())
            storage.copy_(copy, non_blocking=True)
        for chunk in self._wrapped:
            chunk.restore_grad_buffers(synchronize=False)
        if self._device.type == "cuda":
            # The copies in CPU memory are given up below.
            torch.cuda.synchronize(self._device)
        self._away = None

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Memory that is the optimizer's alone; each once."""
        seen = {
            parameter.untyped_storage().data_ptr()
            for chunk in self._wrapped
            for parameter in chunk.parameters()
        }
        for tensor in _optimizer_tensors(self._optimizer):
            storage = tensor.untyped_storage()
            if tensor.device == self._device and storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """fp32 weights, which may be the model's own, and moments."""
    for leaf in leaves(optimizer):
        for group in leaf.optimizer.param_groups:
            yield from group["params"]
        for state in leaf.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
