"""Drawing a token: the inverse of the cumulative distribution, within top-k and top-p."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sftrl.engine.next_token import _draw
from megatron_sftrl.types import SamplingParams

LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.1, -4.0, 1.5, 0.3]])
PLAIN = SamplingParams()


def draw_all(sampling: SamplingParams, *, num: int = 4096, logits: Tensor = LOGITS) -> Tensor:
    """How often each id is drawn by evenly spread numbers, the ends of [0, 1) included."""
    uniforms = torch.linspace(0.0, 1.0 - 2.0**-53, num, dtype=torch.float64)
    ids, _ = _draw(logits.expand(num, -1), uniforms, sampling)
    return torch.bincount(ids.long(), minlength=logits.shape[1]) / num


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    found = draw_all(replace(PLAIN, temperature=temperature))
    expected = (LOGITS[0] / temperature).softmax(0)
    # Evenly spread numbers: each count is off by at most one at either edge.
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / 4096)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (replace(PLAIN, top_k=1), {2}),
        (replace(PLAIN, top_k=2), {2, 5}),
        # Of two equal logits the lower id ranks first.
        (replace(PLAIN, top_k=3), {2, 5, 0}),
        (replace(PLAIN, top_p=1e-9), {2}),
        # Probabilities in order: 0.46, 0.28, 0.08, 0.08, 0.07, 0.02, 0.001; six of them hold 0.999.
        (replace(PLAIN, top_p=0.45), {2}),
        (replace(PLAIN, top_p=0.47), {2, 5}),
        (replace(PLAIN, top_p=0.99), {0, 1, 2, 3, 5, 6}),
        # top_p is taken of what top_k has left: 0.62 and 0.38.
        (replace(PLAIN, top_k=2, top_p=0.6), {2}),
        (replace(PLAIN, top_k=2, top_p=0.65), {2, 5}),
        (replace(PLAIN, temperature=0.0), {2}),
    ],
)
def test_exactly_the_kept_tokens_are_drawn_with_their_renormalised_probabilities(
    sampling: SamplingParams, kept: set[int]
) -> None:
    found = draw_all(sampling)
    assert {index for index, share in enumerate(found.tolist()) if share > 0} == kept
    weights = torch.zeros_like(found)
    for index in kept:
        weights[index] = LOGITS[0].softmax(0)[index]
    torch.testing.assert_close(found, weights / weights.sum(), rtol=0, atol=2 / 4096)


def test_no_number_draws_outside_of_the_cut_for_any_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 300, generator=generator)
    uniforms = torch.rand(2000, dtype=torch.float64, generator=generator)
    uniforms[:10], uniforms[10:20] = 0.0, 1.0 - 2.0**-53
    sampling = SamplingParams(top_k=9, top_p=0.8, temperature=1.3)
    ids, _ = _draw(logits, uniforms, sampling)
    for row, index in zip((logits.double() / 1.3), ids.long().tolist(), strict=True):
        best = row.sort(descending=True)
        rank = best.indices.tolist().index(index)
        assert rank < 9
        assert best.values[:9].softmax(0)[:rank].sum() < 0.8


def test_the_reported_log_probability_is_of_the_whole_vocabulary() -> None:
    """Within the 1e-6 that engines promise; renormalised over two tokens it would be off by 0.3."""
    sampling = SamplingParams(temperature=0.7, top_k=2)
    ids, logprobs = _draw(LOGITS, torch.tensor([0.9], dtype=torch.float64), sampling)
    expected = (LOGITS[0].double() / 0.7).log_softmax(0)[int(ids)]
    assert float(logprobs) == pytest.approx(float(expected), abs=1e-6)
    greedy, at_one = _draw(LOGITS, torch.zeros(1, dtype=torch.float64), replace(sampling, temperature=0.0))
    assert int(greedy) == 2
    assert float(at_one) == pytest.approx(float(LOGITS[0].double().log_softmax(0)[2]), abs=1e-6)


@pytest.mark.parametrize(
    "sampling", [PLAIN, replace(PLAIN, temperature=0.0), replace(PLAIN, top_k=2, top_p=0.5)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_drawn_from_logits_that_are_not_finite(sampling: SamplingParams, bad: float) -> None:
    logits = LOGITS.repeat(3, 50)
    logits[1, 140] = bad
    ids, logprobs = _draw(logits, torch.full((3,), 0.999, dtype=torch.float64), sampling)
    assert bool(ids.isnan().all() and logprobs.isnan().all())
    logits[1] = -torch.inf
    assert bool(_draw(logits, torch.zeros(3, dtype=torch.float64), sampling)[1].isnan().all())


def test_a_token_that_is_ruled_out_by_minus_infinity_spoils_nothing() -> None:
    logits = LOGITS.clone()
    logits[0, 3] = -torch.inf
    found = draw_all(PLAIN, logits=logits)
    torch.testing.assert_close(found, logits[0].softmax(0), rtol=0, atol=2 / 4096)
