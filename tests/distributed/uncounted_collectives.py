"""Collectives of gloo that leave nothing behind for a measurement of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LABEL = "uncounted collective"
_BY_THE_CALLER = (torch.ops.c10d.send.default, torch.ops.c10d.recv_.default)


class UncountedCollectives(TorchDispatchMode):
    """Runs every collective to its end, on stand-ins that PyTorch's allocator does not know.

    gloo's threads drop their reference to a message's tensors some time after its end, and a release on
    their threads reaches no profiler: a busy machine added 5 MB to a peak of 11. A stand-in is memory of
    NumPy's, so nothing that is counted hangs on those threads; what gloo itself allocates lies between the
    start and the end of a `LABEL`. Sending and receiving is done by the caller's thread and stays as it is.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "c10d" or func in _BY_THE_CALLER:
            return func(*args, **kwargs)
        with record_function(LABEL):
            stand_ins = tree_map_only(Tensor, stand_in, args)
            work = func(*stand_ins, **kwargs)
            work = work[-1] if isinstance(work, tuple) else work
            dist.Work.unbox(work).wait()
            del work
            # The first argument of every collective is what it writes to; an input may be a part of it.
            for tensor, result in zip(tree_leaves(args[0]), tree_leaves(stand_ins[0]), strict=True):
                tensor.data.copy_(result)
            done = finished_work()
        return done if len(func._schema.returns) == 1 else (args[0], done)


def stand_in(tensor: Tensor) -> Tensor:
    """A copy whose bytes are not of PyTorch's allocator."""
    if not tensor.numel():
        return tensor
    memory = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), np.uint8))
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor.data)


def finished_work() -> Any:
    """The handle of a collective that is over; it holds no tensor."""
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return torch._C._distributed_c10d._create_work_from_future(future).boxed()
