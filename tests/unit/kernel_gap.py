"""How far another's fused cross-entropy is from ours; a program, since Triton decides at its import."""

from __future__ import annotations

import json
import sys

import torch

from tools.benchmarks.loss_contenders import Sizes, make_batch, make_model, make_step


def gap(name: str, steps: int = 1) -> float:
    """The largest difference of the loss and of the gradients of hidden states and weight.

    Each is relative to the largest entry of ours, after one step of ours and some of the other's: steps do
    not add up.
    """
    sizes = Sizes(tokens=24, vocab_size=130, hidden=8, tp=1)
    found = []
    for contender in ("sft", name):
        model = make_model(sizes, torch.device("cpu"))
        step = make_step(contender, model, make_batch(sizes, torch.device("cpu")), sizes)
        losses = [step() for _ in range(1 if contender == "sft" else steps)]
        assert model.hidden.grad is not None
        assert contender == "sft" or model.weight.grad is None  # ours leaves Megatron's placeholder
        found.append((losses[-1], model.hidden.grad, model.main_grad))
    return max(
        ((ours - other).abs().max() / ours.abs().max()).item() for ours, other in zip(*found, strict=True)
    )


if __name__ == "__main__":
    print(json.dumps(gap(sys.argv[1])))
