"""What the benchmark of the losses compares computes the same thing, on one process and on two."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sftrl.config.schema import ParallelSection
from tests.ranks import ROOT, run_ranks
from tests.unit.kernel_gap import gap
from tools.benchmarks import loss_bandwidth, other_kernels
from tools.benchmarks.loss_contenders import LOSSES, Sizes, contenders, make_batch, make_model, make_step
from tools.benchmarks.other_kernels import KERNELS, why_not
from tools.benchmarks.released_losses import RELEASED

SAME = [
    ("plain", "sft"),
    ("plain", "sft, logits"),
    ("gift, logits", "gift"),
    ("curiosft, logits", "curiosft"),
]
CPU = torch.device("cpu")


def gradients(tp: int) -> dict[str, tuple[Tensor, ...]]:
    """The loss and the gradients of hidden states and weight, of each contender that is ours."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel

    context = initialize_parallel(ParallelSection(tp=tp))
    sizes = Sizes(tokens=24, vocab_size=130, hidden=8, tp=tp)
    found = {}
    for name in contenders(tp=tp, device_type="cpu")[0]:
        if name not in KERNELS:
            model = make_model(sizes, context.device)
            loss = make_step(name, model, make_batch(sizes, context.device), sizes)()
            assert model.hidden.grad is not None
            found[name] = (loss, model.hidden.grad, model.main_grad)
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_contenders_of_one_loss_have_its_gradients(tp: int) -> None:
    for found in run_ranks(tp, gradients, tp):
        assert set(found) >= {*LOSSES, "plain"}
        assert {name for name in found if name.endswith(", released")} == (
            {f"{name}, released" for name in LOSSES} if tp == 1 else set()
        )
        for first, second in SAME:
            for ours, other in zip(found[first], found[second], strict=True):
                assert ours.abs().max() > 1e-3
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reference_scale", [1.0, 4.0], ids=["soft reference", "sure reference"])
@pytest.mark.parametrize("name", RELEASED)
def test_a_released_formula_is_the_registered_loss(name: str, reference_scale: float) -> None:
    """Also where eps decides about a label that the reference excludes, where the temperature is found
    between its ends, and where a ratio stays within its bounds and a sequence has more than a block."""
    sizes = Sizes(tokens=84, vocab_size=600, hidden=8, tp=1)  # CurioSFT's 512 largest are not all
    batch = make_batch(sizes, CPU)
    noise = torch.rand(sizes.tokens, generator=torch.Generator().manual_seed(2)) - 0.4
    found = []
    for contender in (name, f"{name}, released"):
        model = make_model(sizes, CPU)
        model = replace(model, reference_hidden=reference_scale * model.reference_hidden)
        logprobs = F.log_softmax(model.hidden.detach() @ model.weight.detach().t(), -1)
        behavior = logprobs.gather(1, batch.labels[:, None]).squeeze(1) + noise
        loss = make_step(contender, model, replace(batch, behavior_logprobs=behavior), sizes)()
        assert model.hidden.grad is not None
        found.append((loss, model.hidden.grad, model.main_grad))
    for ours, released in zip(*found, strict=True):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(released, ours, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_the_gradients_that_others_return_arrive_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> Tensor:
        assert options["reduction"] == "mean"
        return F.cross_entropy(hidden @ weight.t(), labels)

    fake = SimpleNamespace(linear_cross_entropy=cross_entropy, liger_fused_linear_cross_entropy=cross_entropy)
    for module in (other_kernels.MEGATRON, "liger_kernel.transformers.functional", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, module, fake)
    assert gap(name, steps=2) < 1e-6


@pytest.mark.parametrize(
    ("name", "environment"),
    [("liger", {"TRITON_INTERPRET": "1"}), ("cut-cross-entropy, compiled", {})],
)
def test_a_kernel_that_is_installed_has_the_gradients_of_ours(name: str, environment: dict[str, str]) -> None:
    if importlib.util.find_spec(KERNELS[name].module) is None:
        pytest.skip(KERNELS[name].if_missing)
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.kernel_gap", name]
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        command,
        env={**os.environ, **environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-5


def test_a_kernel_is_offered_where_it_can_run_and_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(other_kernels, "_is_installed", lambda _: False)
    names, left_out = contenders(tp=1, device_type="cuda")
    assert set(left_out) == set(KERNELS)
    assert left_out["liger"] == "not installed: pip install liger-kernel"
    assert left_out["megatron linear"].startswith("megatron-core ")
    assert names[0] == "plain"
    assert not set(names) & set(left_out)

    monkeypatch.setattr(other_kernels, "_is_installed", lambda _: True)
    assert contenders(tp=1, device_type="cuda")[1] == {}
    assert set(contenders(tp=1, device_type="cuda")[0]) >= {*KERNELS, "pear block, released", *LOSSES}
    names, left_out = contenders(tp=1, device_type="cpu")
    assert left_out == dict.fromkeys(["liger", "cut-cross-entropy"], "its Triton kernels need CUDA") | {
        "megatron linear": "its CUTLASS kernels need CUDA"
    }
    assert "cut-cross-entropy, compiled" in names
    names, left_out = contenders(tp=2, device_type="cuda")
    assert "megatron linear" in names
    assert set(left_out) == {*KERNELS, *(f"{name}, released" for name in RELEASED)} - {"megatron linear"}
    assert set(left_out.values()) == {"one process only"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not("liger", device_type="cpu", tp=1) is None
    assert why_not("cut-cross-entropy", device_type="cpu", tp=1) == "its Triton kernels need CUDA"


def test_the_share_of_the_matmul_rate_is_of_the_products_that_training_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_bandwidth, "_seconds", lambda *_: 2.0)  # of one product
    sizes = Sizes(tokens=8, vocab_size=6, hidden=4, tp=2)
    three = {"plain": 8.0, "sft": 6.0, "liger": 6.0, "pear block, released": 12.0, "sft, logits": 24.0}
    four = {"gift": 10.0, "gift, logits": 8.0, "gift, released": 16.0, "curiosft, released": 32.0}
    found = loss_bandwidth.matmul_fractions(three | four, sizes, CPU)
    assert found.pop("one product, operations per second") == 2 * 8 * 3 * 4 / 2.0
    shares = {name: 6.0 / seconds for name, seconds in three.items()}
    assert found == pytest.approx(shares | {name: 8.0 / seconds for name, seconds in four.items()})


def test_the_bandwidth_of_one_rank_of_two_is_that_of_its_columns() -> None:
    sizes = Sizes(tokens=16, vocab_size=130, hidden=4, tp=2)
    found = loss_bandwidth.bandwidth_fractions(sizes, CPU, repeats=1)
    assert set(found) == {"copy, bytes per second", "sft", "entropy", "pear", "gift"}
