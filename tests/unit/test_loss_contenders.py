"""What the benchmark of the losses compares computes the same thing, on one process and on two."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sftrl.config.schema import ParallelSection
from tests.ranks import ROOT, run_ranks
from tools.loss_contenders import LOSSES, Sizes, contenders, make_batch, make_model, make_step

SAME = [
    ("plain", "sft"),
    ("plain", "sft, logits"),
    ("gift, logits", "gift"),
    ("curiosft, logits", "curiosft"),
    ("gift", "gift, released"),
]


def gradients(tp: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of hidden states and weight, of every contender."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel

    context = initialize_parallel(ParallelSection(tp=tp))
    sizes = Sizes(tokens=24, vocab_size=130, hidden=8, tp=tp)
    found = {}
    for name in contenders(tp):
        model = make_model(sizes, context.device)
        make_step(name, model, make_batch(sizes, context.device), sizes)()
        assert model.hidden.grad is not None
        found[name] = (model.hidden.grad, model.main_grad)
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_contenders_of_one_loss_have_its_gradients(tp: int) -> None:
    for found in run_ranks(tp, gradients, tp):
        assert set(found) >= {*LOSSES, "plain"}
        assert ("gift, released" in found) == (tp == 1)
        for first, second in SAME:
            if second in found:
                for ours, other in zip(found[first], found[second], strict=True):
                    assert ours.abs().max() > 1e-3
                    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_the_share_of_the_matmul_rate_is_of_the_products_that_training_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    bandwidth = importlib.import_module("loss_bandwidth")
    assert Path(bandwidth.__file__ or "").parent == ROOT / "tools"
    monkeypatch.setattr(bandwidth, "_seconds", lambda *_: 2.0)  # of one product
    sizes = Sizes(tokens=8, vocab_size=6, hidden=4, tp=2)
    seconds = {"plain": 8.0, "sft": 6.0, "gift": 10.0, "gift, logits": 8.0, "gift, released": 16.0}
    found = bandwidth.matmul_fractions(seconds, sizes, torch.device("cpu"))
    assert found.pop("one product, operations per second") == 2 * 8 * 3 * 4 / 2.0
    shares = {"plain": 0.75, "sft": 1.0, "gift": 0.8, "gift, logits": 1.0, "gift, released": 0.5}
    assert found == pytest.approx(shares)


def test_the_bandwidth_of_one_rank_of_two_is_that_of_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    bandwidth = importlib.import_module("loss_bandwidth")
    sizes = Sizes(tokens=16, vocab_size=130, hidden=4, tp=2)
    found = bandwidth.bandwidth_fractions(sizes, torch.device("cpu"), repeats=1)
    assert set(found) == {"copy, bytes per second", "sft", "entropy", "pear", "gift"}
