"""What optimizers on GPUs have that the CPU has not: a second memory, and Transformer Engine's Adam."""

from __future__ import annotations

import contextlib
import math
import sys
import types
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _TwoMemories(TorchFunctionMode):
    """Every tensor says that it is on a GPU, except those that .cpu() gave and what was made of them."""

    _KEEP = (torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float, torch.Tensor.pin_memory)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not hasattr(args[0], "is_on_host")
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            result = result.clone()
        if func is torch.Tensor.cpu or (func in self._KEEP and hasattr(args[0], "is_on_host")):
            result.is_on_host = True
        return result


class FusedAdam(torch.optim.Optimizer):
    """As Transformer Engine's (2.20): weights and moments in dtypes of their own, a count for each group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode
        assert not store_param_remainders
        assert master_weight_dtype == torch.float32
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        assert not store_param_remainders
        for name, dtype in self._dtypes.items():
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
        if self.master_weights:
            self.state[param]["master_param"] = param.detach().clone().float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                grad = param.decoupled_grad if self.use_decoupled_grad else param.grad
                if grad is None:
                    continue
                if not self.state[param]:
                    self.initialize_state(param, False)
                self._move(param, grad.float(), self.state[param], group)

    def _move(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        main = state.get("master_param", param)
        main.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        main.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        if main is not param:
            param.copy_(main)


@contextlib.contextmanager
def gpu_optimizers() -> Iterator[None]:
    """Megatron's optimizers as on a GPU with Transformer Engine, in this process."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    from megatron_sftrl.engine import policy

    def build(original: Any, *args: Any, **kwargs: Any) -> Any:
        with _TwoMemories():
            return original(*args, **kwargs)

    installed = types.ModuleType("transformer_engine.pytorch.optimizers")
    installed.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    names = ("transformer_engine", "transformer_engine.pytorch")
    packages = {**{name: types.ModuleType(name) for name in names}, installed.__name__: installed}
    with (
        mock.patch.dict(sys.modules, packages),
        mock.patch.object(optimizer, "Adam", FusedAdam),
        mock.patch.object(optimizer, "USING_PYTORCH_OPTIMIZER", False),
        mock.patch.object(optimizer, "is_te_min_version", return_value=True),
        mock.patch.object(distrib_optimizer, "Adam", FusedAdam),
        mock.patch.object(optimizer_config, "is_te_min_version", return_value=True),
        mock.patch.object(policy, "build_optimizer", partial(build, policy.build_optimizer)),
    ):
        yield
