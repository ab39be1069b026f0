"""The output layer's products against float64, by oneDNN and by torch.mm, in every memory order they meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel import output_layer

# Of a sum of n products of numbers near 1 in fp32, relative to its size.
FP32 = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=[True, False], ids=["onednn", "mm"])
def onednn(request: pytest.FixtureRequest):
    with torch.backends.mkldnn.flags(enabled=request.param, allow_tf32=False):
        yield request.param


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_layer, "_ONEDNN_FROM", 1)
    monkeypatch.setattr(output_layer, "_CPU_COLUMNS", 8)
    monkeypatch.setattr(output_layer, "_MIXED_COLUMNS", 8)


def factors(num_tokens: int, num_columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H], gradient [T, V] inside wider memory, as padded logits are."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator).to(dtype) for n in (num_tokens, num_columns))
    wide = torch.randn(num_tokens, num_columns + 3, generator=generator).to(dtype)
    return hidden, weight, wide[:, :num_columns]


@pytest.mark.parametrize("num_tokens", [0, 1, 11])
@pytest.mark.parametrize("num_columns", [1, 7, 8, 9, 31])
def test_the_products_are_those_of_float64(num_tokens: int, num_columns: int, onednn: bool) -> None:
    hidden, weight, gradient = factors(num_tokens, num_columns, torch.float32)
    logits = torch.full((num_tokens + 2, num_columns), 7.0)
    total = torch.full((num_columns, 6), 2.0)
    output_layer.write_logits(hidden, weight, logits[:num_tokens])
    output_layer.add_weight_gradient(total, gradient, hidden)
    wide = [value.double() for value in (hidden, weight, gradient)]
    torch.testing.assert_close(logits[:num_tokens].double(), wide[0] @ wide[1].T, **FP32)
    torch.testing.assert_close(
        output_layer.hidden_gradient(gradient, weight).double(), wide[2] @ wide[1], **FP32
    )
    torch.testing.assert_close(total.double(), 2.0 + wide[2].T @ wide[0], **FP32)
    assert (logits[num_tokens:] == 7.0).all()


def test_float64_stays_float64(onednn: bool) -> None:
    hidden, weight, gradient = factors(11, 31, torch.float64)
    logits, total = torch.empty(11, 31, dtype=torch.float64), torch.zeros(31, 6, dtype=torch.float64)
    output_layer.write_logits(hidden, weight, logits)
    output_layer.add_weight_gradient(total, gradient, hidden)
    exact = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(logits, hidden @ weight.T, **exact)
    torch.testing.assert_close(output_layer.hidden_gradient(gradient, weight), gradient @ weight, **exact)
    torch.testing.assert_close(total, gradient.T @ hidden, **exact)


def test_a_bias_is_added_once_to_every_row(onednn: bool) -> None:
    hidden, weight, _ = factors(11, 31, torch.float32)
    bias = torch.arange(31.0)
    expected = hidden.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(output_layer.linear(hidden, weight, bias).double(), expected, **FP32)


def test_only_fp32_factors_that_are_not_empty_go_to_onednn(onednn: bool) -> None:
    def takes(num_tokens: int, dtype: torch.dtype) -> bool:
        hidden, weight, _ = factors(num_tokens, 9, dtype)
        return output_layer._takes_onednn(hidden, weight)

    assert takes(11, torch.float32) is onednn
    assert not takes(0, torch.float32)
    assert not takes(11, torch.float64)
    assert not takes(11, torch.bfloat16)


def test_small_products_stay_with_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = factors(11, 31, torch.float32)
    monkeypatch.setattr(output_layer, "_ONEDNN_FROM", 11 * 31 * 6)
    assert output_layer._takes_onednn(hidden, weight)
    assert not output_layer._takes_onednn(hidden[:10], weight)
