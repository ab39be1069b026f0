"""A token-local loss and its gradients while a chunk's logits are hot: they are made once, and never again.

Each chunk goes from logits to d loss / d logits to the gradients of hidden states [T, H] and output weight in
the forward: three matrix products in all, as many as with all logits in memory; tokens without weight never
meet the vocabulary. While the ranks reduce over one chunk, the policy's logits of the next are made. Like
Liger Kernel's fused linear cross-entropy (arXiv:2410.10989), but for any token-local loss and on
vocabulary-parallel logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import OutputLayer, TokenDistribution
from megatron_sftrl.vocab_parallel.output_layer import GradientSums, NextLogits

TokenFunction = Callable[
    [TokenDistribution, TokenDistribution | None, TokenBatch], tuple[Tensor, dict[str, Tensor]]
]
"""(policy, reference, batch) of some tokens -> ([T] loss, [T] metrics by name)."""

ToDistribution = Callable[[Tensor], TokenDistribution]
"""[T, V_local] logits that may be overwritten -> their distribution."""


@dataclass(kw_only=True, eq=False)
class TokenValues:
    """What a loss said of all tokens of a micro-batch; 0 where a token has no weight.

    Args:
        total: [] sum of token_weight * token_loss, with the gradient into hidden states and weight.
        token_loss, metrics: [T] detached.
        missing: of the metrics, those that the loss did not give for every chunk of tokens.
        is_trained: False where a gradient was asked for and the loss has none.
    """

    total: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    is_trained: bool = True


def one_pass(
    function: TokenFunction,
    policy: OutputLayer,
    reference: OutputLayer | None,
    batch: TokenBatch,
    distribution: ToDistribution,
    *,
    weighted: Tensor | None = None,
) -> TokenValues:
    """sum_t token_weight_t loss_t and its gradients, in one pass over chunks of tokens.

    d total is taken as 1: the weight's gradient is in `policy.main_grad`, where there is one, when this
    returns, and a backward of `total` only brings the hidden states theirs.

    Args:
        function: what it says of a token depends on that token alone.
        reference: another output layer over the same tokens, without gradient.
        distribution: what logits become.
        weighted: [K] int64 tokens whose token_weight is not 0, in order; the device is asked without it.
    """
    if weighted is None:
        weighted = (batch.token_weight > 0).nonzero().squeeze(1)
    wants_gradient = torch.is_grad_enabled() and policy.requires_grad
    work = _Work(function, policy, reference, batch, distribution, weighted, wants_gradient)
    total = _OnePass.apply(work, policy.hidden, policy.weight) if wants_gradient else work.run(None)
    assert isinstance(total, Tensor)
    return TokenValues(
        total=total,
        token_loss=work.token_loss,
        metrics=work.metrics,
        missing=frozenset(work.missing),
        is_trained=work.has_gradient or not wants_gradient,
    )


class _Work:
    """One micro-batch on its way through the chunks."""

    def __init__(
        self,
        function: TokenFunction,
        policy: OutputLayer,
        reference: OutputLayer | None,
        batch: TokenBatch,
        distribution: ToDistribution,
        weighted: Tensor,
        wants_gradient: bool,
    ) -> None:
        self._function, self._distribution = function, distribution
        self.policy, self._reference = policy, reference
        self._batch, self._weighted, self._wants_gradient = batch, weighted, wants_gradient
        self.token_loss = torch.zeros_like(batch.token_weight)
        self.metrics: dict[str, Tensor] = {}
        self.missing: set[str] = set()
        self.has_gradient = False
        self._chunks_done = 0

    def run(self, sums: GradientSums | None) -> Tensor:
        """The total; its gradients are added to `sums`."""
        total = self.token_loss.new_zeros((), dtype=torch.float64)
        # At least one chunk, so that every metric has its name.
        chunks = [self._weighted[rows] for rows in self.policy.chunks(max(1, self._weighted.numel()))]
        logits = NextLogits(self.policy, chunks)
        reference = None if self._reference is None else NextLogits(self._reference, chunks)
        for tokens in chunks:
            total += self._chunk(tokens, logits, reference, sums)
        return total.to(self.token_loss.dtype)

    def _chunk(
        self, tokens: Tensor, ahead: NextLogits, reference: NextLogits | None, sums: GradientSums | None
    ) -> Tensor:
        batch = _some_tokens(self._batch, tokens)
        logits = ahead.take().detach()
        prior = None if reference is None else self._distribution(reference.take())
        with torch.enable_grad() if self._wants_gradient else torch.no_grad():
            policy = self._distribution(logits.requires_grad_(self._wants_gradient))
            policy.while_reducing(ahead.advance)
            token_loss, metrics = self._function(policy, prior, batch)
            total = weighted_sum(token_loss, batch.token_weight)
        self.token_loss[tokens] = token_loss.detach().to(self.token_loss.dtype)
        if self._chunks_done > 0:
            self.missing |= self.metrics.keys() ^ metrics.keys()
        self._chunks_done += 1
        for name, values in metrics.items():
            whole = self.metrics.setdefault(name, torch.zeros_like(self.token_loss))
            whole[tokens] = values.to(whole.dtype)
        self.has_gradient |= total.requires_grad
        if sums is not None and total.requires_grad:
            (gradient,) = torch.autograd.grad(total, logits)
            self.policy.add_gradients(tokens, gradient, sums)
        return total.detach().double()


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work: _Work, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.layer, ctx.sums = work.policy, GradientSums.of(work.policy)
        return work.run(ctx.sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        sums: GradientSums = ctx.sums
        assert grad.is_cuda or grad == 1, "the gradients were taken for d total = 1"
        return None, sums.hidden, ctx.layer.tell_autograd(sums)


def _some_tokens(batch: TokenBatch, tokens: Tensor) -> TokenBatch:
    """The batch of some tokens, as if they were one sequence."""
    # Not of a list: copying it to a device would wait for the device.
    bounds = torch.arange(2, dtype=batch.cu_seqlens.dtype, device=tokens.device) * tokens.numel()
    return batch.map(lambda value: value[tokens], cu_seqlens=bounds, prefixes=())


def weighted_sum(token_loss: Tensor, token_weight: Tensor) -> Tensor:
    """[] sum_t token_weight * token_loss over the tokens that have a weight; token_loss [T] in nats.

    What stands elsewhere, NaN and inf included, reaches neither the value nor the gradient.
    """
    has_weight = token_weight > 0
    return (torch.where(has_weight, token_loss, 0.0) * token_weight.to(token_loss.dtype)).sum()
