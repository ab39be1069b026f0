"""The Triton kernels on a CUDA device, against PyTorch's arithmetic on it and against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.vocab_parallel import TokenDistribution
from megatron_sftrl.vocab_parallel.output_layer import add_weight_gradient
from tests.unit.vocab_parallel import kernel_checks
from tests.unit.vocab_parallel.test_triton_kernels import GRADIENTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The hardware's exponential has two more roundings than the one of the CPU.
SUMS = 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_loss_has_the_value_and_gradient_of_pytorch_and_of_float64(dtype: str) -> None:
    found = kernel_checks.loss_errors(dtype, "cuda")
    assert not {
        case: errors
        for case, errors in found.items()
        if max(errors) > (GRADIENTS[dtype] if case.endswith("gradient") else SUMS)
    }


@pytest.mark.parametrize("shard", kernel_checks.SHARDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_shard_has_the_sums_and_gradients_of_pytorch(dtype: str, shard: str) -> None:
    found = kernel_checks.shard_errors(dtype, shard, "cuda")
    assert not {
        name: errors
        for name, errors in found.items()
        if errors[0] > (GRADIENTS[dtype] if name.startswith("d ") else SUMS)
    }


@pytest.mark.parametrize("num_tokens", [1, 8192])
def test_a_vocabulary_of_152k_has_the_values_and_gradients_of_pytorch(num_tokens: int) -> None:
    found = kernel_checks.wide_errors(num_tokens, 151_936, "cuda")
    bounds = {"gradient": GRADIENTS["bf16"], "value": SUMS}
    assert not {name: error for name, error in found.items() if error > bounds[name.split()[-1]]}


def test_no_tokens_are_no_trouble() -> None:
    kernel_checks.check_no_tokens("cuda")


def test_a_loss_on_cuda_needs_no_memory_but_its_gradient() -> None:
    """That is how one sees that the kernels run without being asked for: PyTorch needs fp32 chunks."""
    logits = torch.randn(4096, 32_768, device="cuda", dtype=torch.bfloat16).requires_grad_()
    ids = torch.arange(4096, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    distribution = TokenDistribution.from_logits(logits, vocab_size=32_768)
    (distribution.logprobs(ids).sum() + distribution.entropy().sum()).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * logits.nbytes


def test_a_weight_gradient_is_added_to_its_fp32_sum_without_a_temporary() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(2048, 32_768, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16)
    total = torch.randn(32_768, 1024, device="cuda")
    expected = total.double() + gradient.double().t() @ hidden.double()
    add_weight_gradient(torch.zeros_like(total), gradient, hidden)  # with what is allocated once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_weight_gradient(total, gradient, hidden)
    assert torch.cuda.max_memory_allocated() - before < 0.1 * total.nbytes
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-3)
