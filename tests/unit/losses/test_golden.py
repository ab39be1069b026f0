"""Every loss equals its float64 truth, in value and gradient, for each split of the vocabulary and each way
that logits come to be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from megatron_sftrl.losses.registry import Loss
from megatron_sftrl.vocab_parallel import OutputLayer
from megatron_sftrl.vocab_parallel.one_pass import one_pass, weighted_sum
from tests.ranks import run_ranks

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "losses.npz"
V = 640
CASES = {
    "sft": ("sft", {}),
    "gift": ("gift", {"beta": 20.0, "eps": 1e-10}),
    "gift_beta2_smooth": ("gift", {"beta": 2.0, "smoothing": 0.05, "eps": 1e-10}),
    "gift_beta5_exact": ("gift", {"beta": 5.0, "eps": 0.0}),
    "pear_token": ("pear", {}),
    "pear_block4": ("pear", {"variant": "block", "block_size": 4}),
    "pear_sequence": ("pear", {"variant": "sequence"}),
    "curiosft": ("curiosft", {}),
    "dft": ("dft", {}),
    "entropy": ("entropy", {"coef": 0.1}),
    "label_smoothing": ("label_smoothing", {"smoothing": 0.1}),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


PATHS = ("logits", "two_passes", "one_pass")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rank computed: [T] losses, their mean over loss tokens, [T, its columns] its gradient."""

    token_loss: Tensor
    mean: Tensor
    gradient: Tensor


@dataclass(frozen=True, kw_only=True)
class Columns:
    """This rank's columns of the vocabulary, padded to one width on all ranks."""

    group: dist.ProcessGroup | None
    start: int
    stop: int
    width: int

    def of(self, whole: Tensor) -> Tensor:
        """[T, V] -> [T, width], with huge numbers in the padding."""
        mine = whole[:, self.start : self.stop]
        return torch.nn.functional.pad(mine, (0, self.width - mine.shape[1]), value=1e30)


def errors(dtype_name: str, path: str = "logits", device: str = "cpu") -> dict[str, tuple[float, ...]]:
    """For each case the largest errors of loss, mean and gradient on this rank, relative to the truth."""
    golden, dtype = np.load(GOLDEN), DTYPES[dtype_name]
    group = dist.group.WORLD if dist.is_initialized() else None
    size, rank = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    width = -(-V // size)
    columns = Columns(group=group, start=rank * width, stop=min((rank + 1) * width, V), width=width)
    z, u = (torch.from_numpy(golden[name]).reshape(-1, V).to(device, dtype) for name in "zu")
    num_sequences, length = golden["y"].shape
    mask = torch.from_numpy(golden["m"]).flatten().bool()
    batch = TokenBatch(
        tokens=torch.zeros_like(mask, dtype=torch.int64),
        labels=torch.from_numpy(golden["y"]).flatten(),
        positions=torch.arange(length).repeat(num_sequences),
        loss_mask=mask,
        cu_seqlens=torch.arange(num_sequences + 1, dtype=torch.int32) * length,
        token_weight=mask.to(dtype) / mask.sum(),
        behavior_logprobs=torch.from_numpy(golden["b"]).flatten().to(dtype),
    ).to(device)
    mask = mask.to(device)
    found = {}
    for case, (name, options) in CASES.items():
        loss = build_loss(name, options)
        if path == "one_pass" and not loss.is_token_local:
            continue
        ours = (
            with_logits(loss, z, u, batch, columns)
            if path == "logits"
            else fused(loss, z, u, batch, columns, in_one_pass=path == "one_pass")
        )
        truth = torch.from_numpy(golden[f"{case}.per_token"]).flatten().to(device)  # 0 where masked
        gradient = torch.from_numpy(golden[f"{case}.grad"]).reshape(-1, V).to(device)
        scale = gradient.abs().max()
        found[case] = (
            ((ours.token_loss - truth).abs()[mask].max() / truth.abs().max()).item(),
            abs(ours.mean.item() / golden[f"{case}.mean"].item() - 1),
            ((ours.gradient - gradient[:, columns.start : columns.stop]).abs().max() / scale).item(),
        )
    return found


def with_logits(loss: Loss, z: Tensor, u: Tensor, batch: TokenBatch, columns: Columns) -> Found:
    logits = columns.of(z).requires_grad_()
    before = logits.detach().clone()
    inputs = LossInputs(
        policy=TokenDistribution.from_logits(logits, vocab_size=V, group=columns.group),
        batch=batch,
        reference=TokenDistribution.from_logits(columns.of(u), vocab_size=V, group=columns.group),
    )
    token_loss = loss(inputs).token_loss
    mean = weighted_sum(token_loss, batch.token_weight)
    mean.backward()
    assert logits.grad is not None
    assert torch.equal(logits.detach(), before), "the logits were modified"
    num_columns = columns.stop - columns.start
    assert (logits.grad[:, num_columns:] == 0).all(), "padding got a gradient"
    return Found(token_loss=token_loss, mean=mean, gradient=logits.grad[:, :num_columns])


def fused(
    loss: Loss, z: Tensor, u: Tensor, batch: TokenBatch, columns: Columns, *, in_one_pass: bool
) -> Found:
    """Hidden states z and a weight that is this rank's rows of the identity: their product is z itself."""
    weight = columns.of(torch.eye(V, dtype=z.dtype, device=z.device)).t().contiguous().requires_grad_()
    chunk_bytes = 7 * weight.shape[0] * z.itemsize  # of 7 tokens, which divide no length here
    policy = OutputLayer(hidden=z.clone().requires_grad_(), weight=weight, chunk_bytes=chunk_bytes)
    reference = OutputLayer(hidden=u, weight=weight.detach(), chunk_bytes=chunk_bytes)
    where = {"vocab_size": V, "group": columns.group}

    def of_tokens(policy: TokenDistribution, reference: TokenDistribution | None, batch: TokenBatch):
        output = loss(LossInputs(policy=policy, reference=reference, batch=batch, is_part=True))
        return output.token_loss, output.metrics

    if in_one_pass:
        to_distribution = partial(TokenDistribution.from_logits, is_scratch=True, **where)
        found = one_pass(of_tokens, policy, reference, batch, to_distribution)
        token_loss, mean = found.token_loss, found.total
    else:
        inputs = LossInputs(
            policy=TokenDistribution.from_output_layer(policy, **where),
            batch=batch,
            reference=TokenDistribution.from_output_layer(reference, **where),
        )
        token_loss = loss(inputs).token_loss
        mean = weighted_sum(token_loss, batch.token_weight)
    mean.backward()
    assert policy.hidden.grad is not None
    assert weight.grad is not None
    mine = slice(columns.start, columns.stop)
    # d weight = (d logits)^T hidden, from a d logits that is compared with the truth.
    gradient = policy.hidden.grad[:, mine]
    bound = 1e-4 if z.dtype == torch.float32 else 1e-12  # sums over all tokens in another order
    expected = gradient.t() @ z
    torch.testing.assert_close(
        weight.grad[: expected.shape[0]], expected, rtol=0, atol=bound * expected.abs().max().item()
    )
    assert (weight.grad[expected.shape[0] :] == 0).all(), "padding got a gradient"
    return Found(token_loss=token_loss, mean=mean, gradient=gradient)


# float64: both sides are exact to about 1e-15 per operation; 1e-10 is the promised bound.
# float32: inputs are rounded at 6e-8 and lead to a few ulp of the largest logit; 1e-5 is the promised bound.
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tp", [0, 1, 2, 3])
def test_every_loss_equals_its_truth_in_value_and_gradient(dtype: str, bound: float, tp: int, path: str):
    """tp = 0 is no process group at all."""
    for rank, found in enumerate(run_ranks(tp, errors, dtype, path) if tp else [errors(dtype, path)]):
        too_large = {case: error for case, error in found.items() if not all(e <= bound for e in error)}
        assert not too_large, f"rank {rank}: {too_large}"
