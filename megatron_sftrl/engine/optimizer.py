"""Megatron's DDP and optimizer around model chunks, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sftrl.config.schema import OptimSection, ParallelSection
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.weight_gathers import WeightGathers


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """What one optimizer step did.

    Args:
        grad_norm: global L2 norm before clipping.
        lr: learning rate used.
        is_skipped: the loss or the gradient was not finite and no parameter moved.
    """

    grad_norm: float
    lr: float
    is_skipped: bool


def wrap_with_ddp(
    chunks: list[LanguageModel], config: TransformerConfig, parallel: ParallelSection
) -> list[DistributedDataParallel]:
    """Megatron DDP around each chunk; gradients are summed in fp32, never averaged."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        # A non-finite gradient is found by its norm, skipped and counted; no assertion in the backward.
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_param_gather:
        for chunk, ddp in zip(chunks, wrapped, strict=True):
            chunk.gathers = WeightGathers(ddp)
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], optim: OptimSection, *, is_bf16: bool, is_distributed: bool
) -> MegatronOptimizer:
    """Megatron's optimizer; step_if_finite decides what is decayed."""
    config = OptimizerConfig(
        optimizer={"adamw": "adam", "sgd": "sgd"}[optim.name],
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        sgd_momentum=optim.momentum,
        clip_grad=optim.clip_grad,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_distributed_optimizer=is_distributed,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)  # type: ignore[arg-type]


def step_if_finite(
    optimizer: MegatronOptimizer, *, lr: float, is_loss_finite: bool, decays_all: bool = False
) -> OptimStep:
    """Clip and apply the accumulated gradients, unless their norm or the loss is not finite.

    Megatron's own step() checks for non-finite gradients only with an fp16 loss scale, so its parts
    are called one by one.

    Args:
        optimizer: with the gradients of this step.
        lr: learning rate.
        is_loss_finite: on every rank.
        decays_all: norms and biases decay, too.
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
            clip_grad_by_total_norm_fp32([*parameters], max_norm=clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return OptimStep(grad_norm=grad_norm, lr=lr, is_skipped=False)


def leaves(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that own parameters: experts have their own, an empty share has none."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [leaf for leaf in chained if leaf.optimizer is not None]


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
