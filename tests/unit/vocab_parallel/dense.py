"""The answers of TokenDistribution, transcribed for one dense [T, V] tensor and left to autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.vocab_parallel import SmoothedLabels, TokenDistribution, logprobs_together

V, T = 101, 6  # 101 is prime: it divides by no group size
LABELS = torch.tensor([0, 20, 40, 60, 80, 100])  # some on every shard, the first and the last column too
IDS = torch.stack([LABELS, LABELS.flip(0), torch.full((T,), 33)], dim=1)
IDS_WEIGHT = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TAU = torch.linspace(0.5, 2.0, T, dtype=torch.float64)

Shards = Callable[[TokenDistribution, TokenDistribution], Tensor]
Dense = Callable[[Tensor, Tensor], Tensor]


def pick(logp: Tensor) -> Tensor:
    """[T] the label's column."""
    return logp.gather(1, LABELS[:, None]).squeeze(1)


def cross(q: Tensor, logp: Tensor) -> Tensor:
    """-sum q log p, 0 where q is 0."""
    return -torch.where(q > 0, q * logp, 0.0).sum(1)


def tilted(u: Tensor, beta: float, smoothing: float, eps: float) -> Tensor:
    """[T, V] the six steps of the released GIFT trainer."""
    prior = (1 - smoothing) * u.softmax(1) + smoothing / V + eps
    return (prior.log() + beta * torch.nn.functional.one_hot(LABELS, V)).softmax(1)


def smoothed(s: float) -> Tensor:
    """[T, V] label-smoothed targets."""
    return (1 - s) * torch.nn.functional.one_hot(LABELS, V).double() + s / V


# name: (through TokenDistribution p and q, through dense logits z and u)
PRIMITIVES: dict[str, tuple[Shards, Dense]] = {
    "logprobs": (lambda p, q: p.logprobs(LABELS), lambda z, u: pick(z.log_softmax(1))),
    "logprobs of each": (
        lambda p, q: (p.logprobs_of_each(IDS) * IDS_WEIGHT).sum(1),
        lambda z, u: (z.log_softmax(1).gather(1, IDS) * IDS_WEIGHT).sum(1),
    ),
    "entropy": (lambda p, q: p.entropy(), lambda z, u: cross(z.softmax(1), z.log_softmax(1))),
    "mean_logprob": (lambda p, q: p.mean_logprob(), lambda z, u: z.log_softmax(1).mean(1)),
    "cross_entropy": (
        lambda p, q: p.cross_entropy(q),
        lambda z, u: cross(u.softmax(1), z.log_softmax(1)),
    ),
    "kl_from": (
        lambda p, q: p.kl_from(q),
        lambda z, u: (u.softmax(1) * (u.log_softmax(1) - z.log_softmax(1))).sum(1),
    ),
    "kl_to": (
        lambda p, q: p.kl_to(q),
        lambda z, u: (z.softmax(1) * (z.log_softmax(1) - u.log_softmax(1))).sum(1),
    ),
    "tilted": (
        lambda p, q: p.cross_entropy(q.tilted(LABELS, 3.0)),
        lambda z, u: cross(tilted(u, 3.0, 0.0, 0.0), z.log_softmax(1)),
    ),
    "tilted with smoothing and eps": (
        lambda p, q: p.cross_entropy(q.tilted(LABELS, 2.0, 0.05, 1e-3)),
        lambda z, u: cross(tilted(u, 2.0, 0.05, 1e-3), z.log_softmax(1)),
    ),
    "smoothed labels": (
        lambda p, q: p.cross_entropy(SmoothedLabels(labels=LABELS, smoothing=0.2)),
        lambda z, u: cross(smoothed(0.2), z.log_softmax(1)),
    ),
    "tempered logprobs": (
        lambda p, q: p.tempered(TAU).logprobs(LABELS),
        lambda z, u: pick((z / TAU[:, None]).log_softmax(1)),
    ),
    "tempered entropy": (
        lambda p, q: p.tempered(2.0).tempered(TAU).entropy(),
        lambda z, u: cross((z / 2 / TAU[:, None]).softmax(1), (z / 2 / TAU[:, None]).log_softmax(1)),
    ),
    "tempered target": (
        lambda p, q: p.kl_from(q.tempered(TAU)),
        lambda z, u: (
            (u / TAU[:, None]).softmax(1) * ((u / TAU[:, None]).log_softmax(1) - z.log_softmax(1))
        ).sum(1),
    ),
    "tempered self against target": (
        lambda p, q: p.tempered(TAU).kl_to(q),
        lambda z, u: (
            (z / TAU[:, None]).softmax(1) * ((z / TAU[:, None]).log_softmax(1) - u.log_softmax(1))
        ).sum(1),
    ),
    "two distributions together": (
        lambda p, q: torch.stack(logprobs_together([p, q, p.tempered(TAU)], LABELS)).sum(0),
        lambda z, u: pick(z.log_softmax(1) + u.log_softmax(1) + (z / TAU[:, None]).log_softmax(1)),
    ),
    "several at once": (
        lambda p, q: p.entropy() * p.logprobs(LABELS) + p.mean_logprob() * p.kl_to(q),
        lambda z, u: (
            cross(z.softmax(1), z.log_softmax(1)) * pick(z.log_softmax(1))
            + z.log_softmax(1).mean(1) * (z.softmax(1) * (z.log_softmax(1) - u.log_softmax(1))).sum(1)
        ),
    ),
}


def logits(seed: int, scale: float = 3.0) -> Tensor:
    """[T, V] float64, alike on every rank."""
    return scale * torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def world() -> tuple[dist.ProcessGroup | None, int, int]:
    """Group, size and rank here; no group outside of run_ranks."""
    if not dist.is_initialized():
        return None, 1, 0
    return dist.group.WORLD, dist.get_world_size(), dist.get_rank()


def shard(whole: Tensor, *, padding: float | None = 1e30) -> tuple[Tensor, slice]:
    """This rank's [T, V_local], padded to equal widths unless `padding` is None, and its real columns."""
    _, size, rank = world()
    width = -(-whole.shape[1] // size)
    columns = slice(rank * width, min((rank + 1) * width, whole.shape[1]))
    local = whole[:, columns]
    if padding is not None:
        local = torch.nn.functional.pad(local, (0, width - local.shape[1]), value=padding)
    return local.contiguous(), columns


def distribution(local: Tensor, vocab_size: int = V) -> TokenDistribution:
    """The distribution of this rank's shard over the whole world."""
    return TokenDistribution.from_logits(local, vocab_size=vocab_size, group=world()[0])
