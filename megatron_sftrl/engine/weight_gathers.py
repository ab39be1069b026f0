"""Weights that are still on their way from the ranks whose optimizer moved them.

With parallel.overlap_param_gather a rank updates its share of the weights, and the others' shares arrive
during the next forward: calling a module waits for that module's weights. Code that reads a weight and does
not call its module has to wait itself, through LanguageModel.wait_for_weights().
"""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel


class WeightGathers:
    """The all-gathers of one chunk's weights.

    Megatron's own start_param_sync(force_sync=True) returns once an all-gather that is under way has ended,
    also when that one began before the last update (0.16.1, 0.19.2); the rules here leave no such one behind.

    Args:
        wrapped: the chunk in Megatron's DDP, with overlap_param_gather.
    """

    def __init__(self, wrapped: DistributedDataParallel) -> None:
        self._groups = [*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups]

    def wait(self) -> None:
        """Return when every weight is what the last update made it; a collective over data-parallel ranks."""
        for group in self._groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)

    def before_update(self) -> None:
        """Let what is under way end: it reads and writes the memory that the optimizer is about to change."""
        for group in self._groups:
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)

    def after_update(self) -> None:
        """From now on the other ranks' weights are old, whatever was gathered between backward and update."""
        for group in self._groups:
            group.param_gather_dispatched = False
