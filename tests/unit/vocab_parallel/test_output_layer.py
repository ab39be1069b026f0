"""How an output layer's tokens fall into chunks, and where its gradients are summed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_sftrl.vocab_parallel import OutputLayer, output_layer
from megatron_sftrl.vocab_parallel.output_layer import GradientSums

H = 6


def make_layer(num_tokens: int, num_columns: int) -> OutputLayer:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator) for n in (num_tokens, num_columns))
    return OutputLayer(hidden=hidden, weight=weight)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 9, 20, 39, 40, 41, 97])
@pytest.mark.parametrize("most", [1, 5, 8, 20])
def test_chunks_cover_every_token_once_and_fit(
    num_tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_layer, "CPU_LOGITS_BYTES", most * 10 * 4)
    chunks = make_layer(num_tokens, 10).chunks(num_tokens)
    sizes = [rows.stop - rows.start for rows in chunks]
    assert [token for rows in chunks for token in range(rows.start, rows.stop)] == list(range(num_tokens))
    assert all(0 < size <= most for size in sizes)
    assert all(size % 8 == 0 for size in sizes[:-1]) or most < 8


@pytest.mark.parametrize(
    ("device", "columns", "expected"),
    [
        ("cuda", 16_000, 512 * 2**20 // (16_000 * 2)),  # many more tokens than 4,096
        ("cuda", 151_936, 4096),
        ("cpu", 151_936, 112 * 2**20 // (151_936 * 2)),
    ],
)
def test_a_chunk_on_a_gpu_holds_at_least_4096_tokens(device: str, columns: int, expected: int) -> None:
    found = output_layer.tokens_per_chunk(columns, torch.bfloat16, torch.device(device))
    assert found == expected
    given = output_layer.tokens_per_chunk(
        columns, torch.bfloat16, torch.device(device), chunk_bytes=7 * columns * 2
    )
    assert given == 7


@pytest.fixture(params=["by parts", "in one operation"])
def mixed_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Products in fp32 of bf16 factors as on the CPU, and as on CUDA; the calls of the latter."""
    calls: list[str] = []
    monkeypatch.setattr(output_layer, "_MIXED_COLUMNS", 8)
    output_layer._adds_mixed_products.cache_clear()
    if request.param == "by parts":
        yield calls
        return

    def add_product(
        total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor
    ) -> torch.Tensor:
        calls.append("addmm")
        assert dtype == out.dtype
        return out.copy_(total + left.to(dtype) @ right.to(dtype))

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", add_product, "CPU")
    yield calls
    library._destroy()
    output_layer._adds_mixed_products.cache_clear()


def test_the_weights_gradient_of_a_bf16_layer_is_summed_in_its_fp32_buffer(mixed_products: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, gradient = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, H), (20, H), (40, 20))
    )
    buffer = torch.full((20, H), 2.0)
    layer = OutputLayer(hidden=hidden, weight=weight.requires_grad_(), main_grad=buffer)
    sums = GradientSums.of(layer)
    for rows in (slice(0, 24), slice(24, 40)):
        layer.add_gradients(rows, gradient[rows], sums)
    expected = 2.0 + gradient.double().t() @ hidden.double()
    torch.testing.assert_close(buffer.double(), expected, rtol=1e-6, atol=1e-5)  # bf16 is off by 1e-2
    assert layer.tell_autograd(sums) is None
    assert len(mixed_products) in (0, 3)  # tried once, and once a chunk
