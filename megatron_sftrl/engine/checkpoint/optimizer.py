"""Megatron's optimizers seen as one thing: for each parameter, the elements whose state this rank holds.

The plain optimizers hold whole parameters, the distributed one a range of elements of some. Megatron's
own loading of a distributed optimizer's state over torch's Adam fails before the first step (it looks
for a "step" that does not exist yet, 0.16.1); here missing state is created as zeros, which is what
Adam and SGD start from, and the step count is read and set explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from megatron_sftrl.engine.optimizer import leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerShare:
    """What this rank's optimizer holds of one parameter.

    Args:
        parameter: of the model.
        start: element of the parameter at which the share begins.
        tensors: by kind (exp_avg, exp_avg_sq, momentum_buffer, main_param), each with as many elements
            as the share, fp32, the optimizer's own memory.
        is_exclusive: no other data-parallel rank holds these elements.
    """

    parameter: Tensor
    start: int
    tensors: Mapping[str, Tensor]
    is_exclusive: bool


def optimizer_shares(optimizer: MegatronOptimizer) -> list[OptimizerShare]:
    """Everything that the optimizer keeps between steps, except its step count.

    State that the optimizer has not created yet (no step done) is created as zeros.
    """
    shares = []
    for leaf in leaves(optimizer):
        kinds = _kinds(leaf)
        for parameter, main, start in _held(leaf):
            state = leaf.optimizer.state[main]
            for kind in kinds:
                if state.get(kind) is None:
                    state[kind] = torch.zeros_like(main.detach(), dtype=torch.float32)
            if _counts_per_parameter(leaf) and "step" not in state:
                state["step"] = torch.tensor(0.0)
            tensors = {kind: state[kind] for kind in kinds}
            if parameter.dtype != torch.float32:
                tensors["main_param"] = main
            shares.append(
                OptimizerShare(
                    parameter=parameter,
                    start=start,
                    tensors=tensors,
                    is_exclusive=isinstance(leaf, DistributedOptimizer),
                )
            )
    return shares


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates that this rank's optimizer has applied (Adam's t); 0 for SGD, which does not count."""
    steps = set()
    for leaf in leaves(optimizer):
        if _counts_per_parameter(leaf):
            steps |= {int(state["step"]) for state in leaf.optimizer.state.values() if "step" in state}
        else:
            # Groups without parameters are counted by some (Transformer Engine 2.20), not by others.
            steps |= {
                int(group["step"])
                for group in leaf.optimizer.param_groups
                if group["params"] and "step" in group
            }
    assert len(steps) <= 1, f"parameters disagree on the number of updates: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Make the optimizer believe that it has applied `step` updates; call after optimizer_shares()."""
    for leaf in leaves(optimizer):
        if leaf.config.optimizer != "adam":
            continue
        if _counts_per_parameter(leaf):
            for state in leaf.optimizer.state.values():
                state["step"].fill_(float(step))
        else:
            # Transformer Engine and Apex count per group.
            for group in leaf.optimizer.param_groups:
                group["step"] = step


def _kinds(leaf: MegatronOptimizer) -> tuple[str, ...]:
    if leaf.config.optimizer == "adam":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if leaf.config.sgd_momentum else ()


def _counts_per_parameter(leaf: MegatronOptimizer) -> bool:
    """torch's Adam counts for each parameter, the fused ones for each group, SGD not at all."""
    return isinstance(leaf.optimizer, torch.optim.Adam)


def _held(leaf: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(parameter, the tensor that the inner optimizer updates for it, first element of the share)."""
    if isinstance(leaf, DistributedOptimizer):
        for parameter, (group, index) in leaf.model_param_group_index_map.items():
            buffer, dtype, bucket = leaf.model_param_gbuf_map[parameter]
            owned = leaf.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            yield parameter, leaf.optimizer.param_groups[group]["params"][index], owned.start
    elif isinstance(leaf, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0
        for parameters in leaf.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, parameter, 0
    else:
        assert isinstance(leaf, FP32Optimizer), f"no checkpoint format for {type(leaf).__name__}"
        for group in leaf.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0
