"""Every loss equals its float64 truth, in value and gradient, for each split of the vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
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


def errors(dtype_name: str, device: str = "cpu") -> dict[str, tuple[float, float, float]]:
    """For each case the largest errors of loss, mean and gradient on this rank, relative to the truth."""
    golden, dtype = np.load(GOLDEN), DTYPES[dtype_name]
    group = dist.group.WORLD if dist.is_initialized() else None
    size, rank = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    width = -(-V // size)
    start, stop = rank * width, min((rank + 1) * width, V)

    def shard(name: str) -> torch.Tensor:
        columns = torch.from_numpy(golden[name]).reshape(-1, V)[:, start:stop].to(dtype)
        padded = torch.nn.functional.pad(columns, (0, width - columns.shape[1]), value=1e30)  # huge padding
        return padded.to(device)

    num_sequences, length = golden["y"].shape
    num_tokens = num_sequences * length
    mask = torch.from_numpy(golden["m"]).flatten().bool()
    batch = TokenBatch(
        tokens=torch.zeros(num_tokens, dtype=torch.int64),
        labels=torch.from_numpy(golden["y"]).flatten(),
        positions=torch.arange(length).repeat(num_sequences),
        loss_mask=mask,
        cu_seqlens=torch.arange(num_sequences + 1, dtype=torch.int32) * length,
        token_weight=mask / mask.sum(),
        behavior_logprobs=torch.from_numpy(golden["b"]).flatten().to(dtype),
    ).to(device)
    mask = mask.to(device)
    found = {}
    for case, (name, options) in CASES.items():
        logits = shard("z").requires_grad_()
        before = logits.detach().clone()
        inputs = LossInputs(
            policy=TokenDistribution.from_logits(logits, vocab_size=V, group=group),
            batch=batch,
            reference=TokenDistribution.from_logits(shard("u"), vocab_size=V, group=group),
        )
        loss = build_loss(name, options)(inputs).token_loss
        mean = (loss * mask).sum() / mask.sum()
        mean.backward()
        assert logits.grad is not None
        assert torch.equal(logits.detach(), before), "the logits were modified"
        assert (logits.grad[:, stop - start :] == 0).all(), "padding got a gradient"
        truth = torch.from_numpy(golden[f"{case}.per_token"]).flatten().to(device)  # 0 where masked
        gradient = torch.from_numpy(golden[f"{case}.grad"]).reshape(-1, V)[:, start:stop].to(device)
        found[case] = (
            ((loss - truth).abs()[mask].max() / truth.abs().max()).item(),
            abs(mean.item() / golden[f"{case}.mean"].item() - 1),
            (
                (logits.grad[:, : stop - start] - gradient).abs().max() / abs(golden[f"{case}.grad"]).max()
            ).item(),
        )
    return found


# float64: both sides are exact to about 1e-15 per operation; 1e-10 is the promised bound.
# float32: inputs are rounded at 6e-8 and lead to a few ulp of the largest logit; 1e-5 is the promised bound.
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("tp", [0, 1, 2, 3])
def test_every_loss_equals_its_truth_in_value_and_gradient(dtype: str, bound: float, tp: int):
    """tp = 0 is no process group at all."""
    for rank, found in enumerate(run_ranks(tp, errors, dtype) if tp else [errors(dtype)]):
        too_large = {case: error for case, error in found.items() if not all(e <= bound for e in error)}
        assert not too_large, f"rank {rank}: {too_large}"
