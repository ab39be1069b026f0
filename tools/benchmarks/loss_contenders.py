"""What losses.py measures: output layer and loss, in several ways, on one rank's share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.vocab_parallel import OutputLayer
from megatron_sftrl.vocab_parallel.one_pass import one_pass, weighted_sum
from tools.benchmarks.other_kernels import KERNELS, why_not
from tools.benchmarks.released_losses import RELEASED

PLAIN, RELEASED_SUFFIX, LOGITS_SUFFIX = "plain", ", released", ", logits"
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {},
    "gift": {},
    "curiosft": {},
    "entropy": {},
    "pear": {"variant": "token"},
    "pear block": {"variant": "block"},
    "pear sequence": {"variant": "sequence"},
}


def contenders(*, tp: int, device_type: str) -> tuple[list[str], dict[str, str]]:
    """Who can be tried here, in the order of the table, and of the others the reason why not."""
    dense = [name + RELEASED_SUFFIX for name in RELEASED]
    left_out = {} if tp == 1 else dict.fromkeys(dense, "one process only")
    reasons = {name: why_not(name, device_type=device_type, tp=tp) for name in KERNELS}
    left_out |= {name: reason for name, reason in reasons.items() if reason}
    others = [name + LOGITS_SUFFIX for name in ("sft", "gift", "curiosft")]
    names = [PLAIN, *KERNELS, *dense, *LOSSES, *others]
    return [name for name in names if name not in left_out], left_out


def num_products(name: str) -> int:
    """Of [T, H] with [H, V]: three that training cannot do without, and one of a reference."""
    loss = name.removesuffix(RELEASED_SUFFIX).removesuffix(LOGITS_SUFFIX)
    return 4 if loss in LOSSES and _has_reference(loss) else 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one process's share of the work."""

    tokens: int
    vocab_size: int
    hidden: int
    tp: int

    @property
    def columns(self) -> int:
        """V_local, padded alike on all ranks."""
        return -(-self.vocab_size // self.tp)


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Hidden states and output weights of policy and reference, and the weight's gradient buffer."""

    hidden: Tensor
    weight: Tensor
    main_grad: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor


def make_model(sizes: Sizes, device: torch.device) -> Model:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def weight() -> Tensor:
        return normal(sizes.columns, sizes.hidden) * (3.0 / sizes.hidden**0.5)

    return Model(
        hidden=normal(sizes.tokens, sizes.hidden).requires_grad_(),
        weight=weight().requires_grad_(),
        main_grad=torch.zeros(sizes.columns, sizes.hidden, device=device),
        reference_hidden=normal(sizes.tokens, sizes.hidden),
        reference_weight=weight(),
    )


def make_batch(sizes: Sizes, device: torch.device) -> TokenBatch:
    """Eight sequences; every token carries loss."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, sizes.vocab_size, (sizes.tokens + 1,), generator=generator)
    length = sizes.tokens // 8
    bounds = torch.arange(9, dtype=torch.int32) * length
    bounds[-1] = sizes.tokens
    place = torch.arange(sizes.tokens)
    return TokenBatch(
        tokens=tokens[:-1],
        labels=tokens[1:],
        positions=place - bounds[torch.bucketize(place, bounds[1:], right=True)],
        loss_mask=torch.ones(sizes.tokens, dtype=torch.bool),
        cu_seqlens=bounds,
        token_weight=torch.full((sizes.tokens,), 1.0 / sizes.tokens),
        behavior_logprobs=torch.full((sizes.tokens,), -10.0),
    ).to(device)


def make_step(name: str, model: Model, batch: TokenBatch, sizes: Sizes) -> Callable[[], Tensor]:
    """Forward and backward of one contender; it returns the loss."""
    if name == PLAIN:
        total = functools.partial(_plain, model, batch)
    elif name in KERNELS:
        total = functools.partial(_other_kernel, name, model, batch, sizes)
    elif name.endswith(RELEASED_SUFFIX):
        total = functools.partial(_released, name.removesuffix(RELEASED_SUFFIX), model, batch)
    elif name.endswith(LOGITS_SUFFIX):
        total = functools.partial(_with_logits, name.removesuffix(LOGITS_SUFFIX), model, batch, sizes)
    else:
        total = functools.partial(_fused, name, model, batch, sizes)

    def step() -> Tensor:
        model.hidden.grad = None
        model.main_grad.zero_()
        loss = total()
        loss.backward()
        return loss.detach()

    return step


def _plain(model: Model, batch: TokenBatch) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = _Linear.apply(model.hidden, model.weight, model.main_grad)
    loss = vocab_parallel_cross_entropy(logits, batch.labels)
    return weighted_sum(loss, batch.token_weight)


def _other_kernel(name: str, model: Model, batch: TokenBatch, sizes: Sizes) -> Tensor:
    """Weights are equal and sum to 1: a mean, for which Liger forms the gradient on its way forward."""
    weight = _AddedGradient.apply(model.weight, model.main_grad)
    return KERNELS[name].token_mean(model.hidden, weight, batch.labels, _group(sizes))


def _released(name: str, model: Model, batch: TokenBatch) -> Tensor:
    logits = _Linear.apply(model.hidden, model.weight, model.main_grad)
    reference = F.linear(model.reference_hidden, model.reference_weight) if _has_reference(name) else None
    return weighted_sum(RELEASED[name](logits, reference, batch), batch.token_weight)


def _with_logits(name: str, model: Model, batch: TokenBatch, sizes: Sizes) -> Tensor:
    def distribution(logits: Tensor) -> TokenDistribution:
        return TokenDistribution.from_logits(logits, **_where(sizes))

    reference = F.linear(model.reference_hidden, model.reference_weight) if _has_reference(name) else None
    inputs = LossInputs(
        policy=distribution(_Linear.apply(model.hidden, model.weight, model.main_grad)),
        batch=batch,
        reference=None if reference is None else distribution(reference),
    )
    return weighted_sum(_loss(name)(inputs).token_loss, batch.token_weight)


def _fused(name: str, model: Model, batch: TokenBatch, sizes: Sizes) -> Tensor:
    loss, reference = _loss(name), None
    policy = OutputLayer(hidden=model.hidden, weight=model.weight, main_grad=model.main_grad)
    if _has_reference(name):
        reference = OutputLayer(hidden=model.reference_hidden, weight=model.reference_weight)

    def of_tokens(
        policy: TokenDistribution, reference: TokenDistribution | None, batch: TokenBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = loss(LossInputs(policy=policy, reference=reference, batch=batch, is_part=True))
        return output.token_loss, output.metrics

    if loss.is_token_local:
        to_distribution = functools.partial(TokenDistribution.from_logits, is_scratch=True, **_where(sizes))
        return one_pass(of_tokens, policy, reference, batch, to_distribution).total
    assert reference is None
    inputs = LossInputs(policy=TokenDistribution.from_output_layer(policy, **_where(sizes)), batch=batch)
    return weighted_sum(loss(inputs).token_loss, batch.token_weight)


class _Linear(torch.autograd.Function):
    """hidden @ weight.T that adds the weight's gradient to its buffer, as Megatron's fused kernel does."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.main_grad = main_grad
        return F.linear(hidden, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        if grad.dtype == ctx.main_grad.dtype:
            ctx.main_grad.addmm_(grad.t(), hidden)
        else:
            ctx.main_grad.add_(torch.mm(grad.t(), hidden, out_dtype=ctx.main_grad.dtype))
        return grad @ weight, None, None


class _AddedGradient(torch.autograd.Function):
    """The weight as it is; the gradient that others return for it is added to its buffer."""

    @staticmethod
    def forward(ctx, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.main_grad.add_(grad)
        return None, None


def _loss(name: str):
    return build_loss(name.split()[0], LOSSES[name])


def _has_reference(name: str) -> bool:
    return "reference" in _loss(name).needs


def _group(sizes: Sizes) -> dist.ProcessGroup | None:
    return dist.group.WORLD if sizes.tp > 1 else None


def _where(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "group": _group(sizes),
        "padded_vocab_size": sizes.columns * sizes.tp,
    }
