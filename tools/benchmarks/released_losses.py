"""The losses in the plain dense way: all logits of one process, fp32 arrays [T, V] as many as others make.

Each function takes the policy's logits [T, V], the reference's (or None) and a batch whose tokens all carry
loss, and returns [T] nats. Parameters are the defaults of the registered loss of that name. The arrays end
with the function; the trainers they are taken from keep most until after the backward pass, so the memory
told here is the least that they take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sftrl import TokenBatch

DenseLoss = Callable[[Tensor, Tensor | None, TokenBatch], Tensor]


def sft(logits: Tensor, reference: Tensor | None, batch: TokenBatch) -> Tensor:
    """As in transformers: fp32 copy of the logits, log-softmax, negative log-likelihood."""
    return F.cross_entropy(logits.float(), batch.labels, reduction="none")


def entropy(logits: Tensor, reference: Tensor | None, batch: TokenBatch) -> Tensor:
    """As in verl: H = log sum exp z - sum p z, the softmax p and the product kept for the backward pass."""
    logits = logits.float()
    return -_logprobs(logits, batch.labels) - 0.1 * _entropy(logits)


def gift(logits: Tensor, reference: Tensor | None, batch: TokenBatch) -> Tensor:
    """As in the release (arXiv:2601.09233, github.com/zzy1127/GIFT): an array for each of the six steps.

    beta 20, lambda 0 and eps 1e-10.
    """
    assert reference is not None
    with torch.no_grad():
        probs = F.softmax(reference.float(), dim=-1)
        mixed = (1 - 0.0) * probs + 0.0 / logits.shape[1]  # lambda is a setting there: the copy is made
        log_prior = torch.log(mixed + 1e-10)
        tilted = log_prior.clone()
        tilted.scatter_add_(1, batch.labels[:, None], torch.full_like(tilted[:, :1], 20.0))
        target = F.softmax(tilted, dim=-1)
    return -(target * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def curiosft(logits: Tensor, reference: Tensor | None, batch: TokenBatch) -> Tensor:
    """As in the release (arXiv:2602.02244, github.com/HaoooWang/CurioSFT), alpha 1.

    The largest 512 logits of the whole vocabulary are looked for in each of the 23 entropies, and the
    teacher's logits are divided in place, as there. Left out is the policy's entropy, which it only logs.
    """
    assert reference is not None
    with torch.no_grad():
        teacher = reference.float()
        tau = _temperature(teacher)
        tau[_entropy(teacher) <= 0.03] = 1.1
        teacher.div_(tau[:, None])
        teacher_logprobs = _logprobs(teacher, batch.labels)
    logprobs = _logprobs(logits.float(), batch.labels)
    return -logprobs + 0.5 * (logprobs - teacher_logprobs) ** 2


def pear(logits: Tensor, reference: Tensor | None, batch: TokenBatch, block_size: int | None) -> Tensor:
    """arXiv:2602.01058, Alg. 1, of which no code is released: log-softmax, then vectors per sequence.

    Args:
        logits: [T, V].
        reference: not used.
        batch: whole sequences, with behavior_logprobs.
        block_size: tokens per block; 1 is the token variant, None weighs whole sequences.
    """
    assert batch.behavior_logprobs is not None
    logprobs = _logprobs(logits.float(), batch.labels)
    delta = (logprobs.detach() - batch.behavior_logprobs).clamp(-0.08, 0.3)
    log_weights = []
    for part in delta.split(batch.cu_seqlens.diff().tolist()):
        length = len(part)
        if block_size is None:
            log_weights.append(part.sum().expand(length))
            continue
        place = torch.arange(length, device=part.device)
        block_end = ((place // block_size + 1) * block_size).clamp(max=length)
        before = F.pad(part.cumsum(0), (1, 0))  # [length + 1]
        log_weights.append((length - block_end) * math.log(0.999) + before[-1] - before[block_end])
    return -torch.cat(log_weights).clamp(-10, 5).exp() * logprobs


RELEASED: dict[str, DenseLoss] = {
    "sft": sft,
    "gift": gift,
    "curiosft": curiosft,
    "entropy": entropy,
    "pear": functools.partial(pear, block_size=1),
    "pear block": functools.partial(pear, block_size=4),
    "pear sequence": functools.partial(pear, block_size=None),
}
"""By the name of the registered loss."""


def _logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).gather(1, labels[:, None]).squeeze(1)


def _entropy(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=-1) - (F.softmax(logits, dim=-1) * logits).sum(-1)


def _temperature(teacher: Tensor) -> Tensor:
    """[T]: CurioSFT's twenty rounds of bisection in [1.1, 1.5]."""

    def entropy_at(tau: Tensor | float) -> Tensor:
        top = torch.topk(teacher, k=min(512, teacher.shape[1]), dim=-1).values
        logprobs = F.log_softmax(top / tau, dim=-1)
        return -(logprobs.exp() * logprobs).sum(-1, keepdim=True)

    plain = entropy_at(1.0)  # [T, 1]
    goal = plain + 0.5 * torch.sigmoid(2.0 * (plain - 1.2))
    low, high = torch.full_like(plain, 1.1), torch.full_like(plain, 1.5)
    tau = torch.where(goal >= entropy_at(high), high, 0.5 * (low + high))
    tau = torch.where(goal <= entropy_at(low), low, tau)
    for _ in range(20):
        is_below = entropy_at(tau) < goal
        low, high = torch.where(is_below, tau, low), torch.where(is_below, high, tau)
        tau = 0.5 * (low + high)
    return tau.squeeze(1)
