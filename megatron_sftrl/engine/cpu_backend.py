"""Makes megatron-core's hard-wired CUDA calls land on the CPU; nothing is redirected where CUDA is there.

The only file of the package that changes other libraries. A TorchFunctionMode redirects factory calls and
tensor methods, so torch's own functions stay what they are; functions of the `torch.cuda` module, which a
mode cannot see, are replaced one by one. Written against megatron-core 0.16.1; every entry names its caller.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def install() -> bool:
    """Redirect megatron-core's CUDA calls to the CPU for this process; False where CUDA is available.

    On any device it also defines what megatron-core leaves undefined without Transformer Engine.
    Call it before the first call into megatron.core (importing it is harmless); calling it again changes
    nothing.
    """
    _define_missing_names()
    if torch.cuda.is_available():
        return False
    if isinstance(torch.cuda.current_device, _Redirected):
        return True
    _redirect_cuda_module()
    # Entered and never left: the redirection lasts as long as the process.
    _CpuMode().__enter__()
    _redirect_rng()
    _redirect_token_dispatch()
    _redirect_uneven_gather()
    return True


def import_megatron() -> None:
    """Import megatron.core without what costs half of the time of it and is of no use here.

    wandb, which it would have its inference server log to; and, without CUDA, torch's compilers, which load
    as soon as a function is given to torch.compile: fused functions are then what they were before.

    The garbage collector rests meanwhile and never looks at what is here afterwards: hundreds of thousands of
    objects that stay.
    """
    collects = gc.isenabled()
    gc.disable()
    hidden = "wandb" not in sys.modules
    compiler = torch.compile
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    if torch.cuda.device_count() == 0:
        torch.compile = _uncompiled
    try:
        importlib.import_module("megatron.core")
        if torch.cuda.device_count() == 0:  # for what is imported later
            importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compiler
        if hidden:
            del sys.modules["wandb"]
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton's bindings print what was not released, at the end
        if collects:
            gc.enable()


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def without_redirection() -> contextlib.AbstractContextManager:
    """For a stretch of the package's own small operations, which name their devices.

    Factory calls and tensor methods are then not looked at one by one, which costs as much as one token's
    arithmetic in a small layer. What is replaced in torch.cuda stays replaced.
    """
    return torch._C.DisableTorchFunction()


class _CpuMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer.py and distrib_optimizer.py sort parameters by "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Redirected:
    """A stand-in for a function of torch.cuda; its type tells that install() has run."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Stream:
    """A stream on a device that has no streams: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _Event:
    """An event that has already been reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _redirect_cuda_module() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    # Used as device=torch.cuda.current_device() by schedules, p2p, mappings, layers, DDP buffers.
    cuda.current_device = _Redirected(lambda: _CPU)
    cuda.set_device = _Redirected(lambda device: None)
    cuda.synchronize = _Redirected(lambda device=None: None)
    cuda.empty_cache = _Redirected(lambda: None)
    # Overlapped gradient reduction in distributed/param_and_grad_buffer.py.
    cuda.current_stream = _Redirected(lambda device=None: stream)
    cuda.default_stream = _Redirected(lambda device=None: stream)
    cuda.stream = _Redirected(lambda stream: contextlib.nullcontext())
    cuda.Stream = _Stream
    cuda.Event = _Event
    # tensor_parallel/random.py: one generator serves both devices.
    cuda.manual_seed = _Redirected(torch.manual_seed)
    cuda.get_rng_state = _Redirected(lambda device=None: torch.get_rng_state())
    cuda.set_rng_state = _Redirected(lambda state, device=None: torch.set_rng_state(state))


def _redirect_rng() -> None:
    """The RNG tracker reads CUDA's generators through private functions of its own."""
    from megatron.core.tensor_parallel import random

    module: Any = random
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _define_missing_names() -> None:
    """Names that megatron-core uses without Transformer Engine and defines only with it, on CUDA neither.

    moe_utils.py router_gating_linear() asks whether te_general_gemm is None. random.py
    CheckpointWithoutOutput, for norms and SwiGLU that are recomputed, enters contexts for fp8, there or not.
    """
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    gating: Any = moe_utils
    if not hasattr(gating, "te_general_gemm"):
        gating.te_general_gemm = None
    checkpoints: Any = random
    if not hasattr(checkpoints, "FP8GlobalStateManager"):
        checkpoints.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        checkpoints.activation_recompute_forward = checkpoints.fp8_autocast = _no_context


def _no_context(**_: object) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def _redirect_token_dispatch() -> None:
    """token_dispatcher.py hands split sizes to all_to_all_single as they come from this function: numbers on
    the host when they were on CUDA, but still a tensor, which torch refuses, when they were on the CPU.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module: Any = token_dispatcher
    module.maybe_move_tensor_to_cpu = move_to_host


def _redirect_uneven_gather() -> None:
    """token_dispatcher.py gathers unequal numbers of tokens for experts that are themselves split (etp > 1
    with ep > 1): NCCL takes tensors of unequal sizes, gloo refuses them. Not a case for the mode above, which
    is off during a backward.
    """
    from megatron.core.tensor_parallel import mappings

    module: Any = mappings
    gather_even = module._gather_along_first_dim

    def gather(
        tensor: torch.Tensor,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or len(set(output_split_sizes)) == 1:
            return gather_even(tensor, group, output_split_sizes, use_global_buffer)
        whole = tensor.new_empty((sum(output_split_sizes), *tensor.shape[1:]))
        for rank, part in enumerate(whole.split(output_split_sizes)):
            if rank == group.rank():
                part.copy_(tensor)
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return whole

    module._gather_along_first_dim = gather
