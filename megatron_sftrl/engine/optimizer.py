"""Megatron's DDP and optimizer around model chunks, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.config.schema import OptimSection, ParallelSection
from megatron_sftrl.engine.megatron_config import ddp_config, optimizer_config
from megatron_sftrl.engine.model import LanguageModel, WeightGathers
from megatron_sftrl.engine.parallel import ParallelContext


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """What one optimizer step did.

    Args:
        grad_norm: global L2 norm before clipping.
        is_skipped: the loss or the gradient was not finite and no parameter moved.
    """

    grad_norm: float
    lr: float
    is_skipped: bool


def wrap_with_ddp(
    chunks: list[LanguageModel], config: TransformerConfig, parallel: ParallelSection
) -> list[DistributedDataParallel]:
    """Megatron DDP around each chunk; gradients are summed, never averaged."""
    settings = ddp_config(parallel)
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=settings, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_param_gather:
        for chunk, ddp in zip(chunks, wrapped, strict=True):
            chunk.gathers = WeightGathers(ddp)
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], optim: OptimSection, parallel: ParallelSection, *, is_bf16: bool
) -> MegatronOptimizer:
    """Megatron's optimizer; step_if_finite decides what is decayed.

    Where Megatron takes torch's AdamW, which is without Transformer Engine and Apex, it moves a weight in one
    pass over it and its moments: the default reads and writes a tensor a dozen times (CPU), or has another
    copy of all (CUDA).
    """
    config = optimizer_config(optim, parallel, is_bf16=is_bf16)
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)  # type: ignore[arg-type]
    for inner in (each for leaf in leaves(optimizer) for each in inner_optimizers(leaf)):
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                group["fused"] = True
    return optimizer


def step_if_finite(
    optimizer: MegatronOptimizer, *, lr: float, is_loss_finite: bool, decays_all: bool = False
) -> OptimStep:
    """Clip and apply the accumulated gradients, unless their norm or the loss (on any rank) is not finite.

    Megatron's own step() checks for non-finite gradients only with an fp16 loss scale, so its parts are
    called one by one. With decays_all norms and biases decay, too.
    """
    for group in optimizer.param_groups:
        # Megatron leaves the multipliers to its scheduler; wd_mult is 0 for norms and biases.
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = optimizer.config.weight_decay * (1.0 if decays_all else group["wd_mult"])
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not (is_loss_finite and math.isfinite(grad_norm)):
        return OptimStep(grad_norm=grad_norm, lr=lr, is_skipped=True)
    clip_grad = optimizer.config.clip_grad
    for leaf in leaves(optimizer):
        parameters = leaf.get_parameters()
        if clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(
                [*parameters],
                max_norm=clip_grad,
                total_norm=grad_norm,
                # Of weights whose gradients have another dtype (Megatron's precision-aware optimizer).
                use_decoupled_grad=leaf.config.use_precision_aware_optimizer,
            )
    optimizer.step_with_ready_grads()
    return OptimStep(grad_norm=grad_norm, lr=lr, is_skipped=False)


def leaves(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that own parameters: experts have their own, an empty share has none."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [leaf for leaf in chained if leaf.optimizer is not None]


def inner_optimizers(leaf: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Those that move the weights: with optim.cpu_offload one on the CPU and one beside it, else one."""
    inner = leaf.optimizer
    return [*inner.sub_optimizers] if isinstance(inner, HybridDeviceOptimizer) else [inner]


def learning_rate(step: int, optim: OptimSection, *, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then constant, cosine or linear.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    span = max(1, (optim.schedule_steps or num_steps) - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    shape = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * shape)


# The gradient of a step as one vector over all ranks, and what two of them have in common.


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientProducts:
    """a.a, a.b and b.b of two gradients of one model; every parameter counts once, whatever the layout."""

    aa: float
    ab: float
    bb: float

    @property
    def cosine(self) -> float | None:
        """None where one of the two is 0."""
        length = math.sqrt(self.aa) * math.sqrt(self.bb)
        return self.ab / length if length else None


def gradient_parts(optimizer: MegatronOptimizer, parallel: ParallelContext) -> list[Tensor]:
    """This rank's part of the gradients that were summed last, in the optimizer's own tensors.

    Each element of the model is on one rank alone: left out are copies on other tensor- and data-parallel
    ranks, and a tied embedding's second place.
    """
    optimizer.prepare_grads()
    parts = []
    for leaf in leaves(optimizer):
        is_expert = all(group["is_expert_parallel"] for group in leaf.param_groups)
        replicas = parallel.edp_group if is_expert else parallel.dp_cp_group
        # The distributed optimizer cuts the gradient along its replicas, the others have all of it on each.
        if isinstance(leaf, DistributedOptimizer) or replicas.rank() == 0:
            parts += leaf.get_main_grads_for_grad_norm()
    return parts


_MULTIPLIED = 2**22
"""Elements that are float64 at a time."""


def gradient_products(
    first: Sequence[Tensor], second: Sequence[Tensor], parallel: ParallelContext
) -> GradientProducts:
    """The products of two gradients of one model in one layout, summed in float64; every rank calls it.

    Args:
        first, second: from gradient_parts, or copies of that on any device.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=parallel.device)
    for one, other in zip(first, second, strict=True):
        pairs = zip(one.flatten().split(_MULTIPLIED), other.flatten().split(_MULTIPLIED), strict=True)
        for pair in pairs:
            a, b = (each.to(parallel.device, torch.float64) for each in pair)
            sums += torch.stack([a @ a, a @ b, b @ b])
    dist.all_reduce(sums)
    aa, ab, bb = sums.tolist()
    return GradientProducts(aa=aa, ab=ab, bb=bb)


# What training needs between two steps, out of the device's memory while something else generates there.
#
# Gradients are not kept: every step starts with empty ones. The optimizer's state waits in CPU memory.
# Storages are emptied and filled in place, so every view of them (Megatron's buckets, the optimizer's
# shards, a checkpoint's tensors) is good again afterwards. MegatronOptimizer.offload_to_cpu (0.16.1) makes
# new tensors instead: weights that optimizer and model share in fp32 would come back as copies that the
# model never sees.


class TrainingState:
    """Gradients and optimizer state of one model on this rank: on the device, or away; weights stay.

    On the CPU "away" is another place in the same memory.
    """

    def __init__(
        self, wrapped: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, device: torch.device
    ) -> None:
        self._wrapped, self._optimizer, self._device = wrapped, optimizer, device
        self._away: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] | None = None

    @property
    def is_away(self) -> bool:
        return self._away is not None

    def leave(self) -> None:
        """Drop the gradients and move the optimizer's state to CPU memory, pinned where there is CUDA."""
        assert self._away is None, "the training state is away already"
        # Some hold views of the gradients, which must not be read from now on.
        self._optimizer.zero_grad()
        for leaf in leaves(self._optimizer):
            if isinstance(leaf.optimizer, HybridDeviceOptimizer) and leaf.optimizer.gpu_optimizer:
                # It has fp32 copies of its own; those on the CPU are used again.
                leaf.optimizer.gpu_optimizer.zero_grad()
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
    for inner in (each for leaf in leaves(optimizer) for each in inner_optimizers(leaf)):
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
