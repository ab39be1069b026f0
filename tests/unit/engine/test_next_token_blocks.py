"""Drawing from a vocabulary of several blocks, of which only one is cumulated entry by entry."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.engine.next_token import _draw
from megatron_sftrl.types import SamplingParams


def logits_of(vocab_size: int, num_rows: int = 64) -> torch.Tensor:
    return 3.0 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size))


def sampling_of(**changes: float) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_new_tokens": 1, "num_samples": 1, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab_size", [5, 128, 1000])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_token_is_drawn_by_the_inverse_of_the_cumulative_distribution(
    vocab_size: int, temperature: float
) -> None:
    logits = logits_of(vocab_size)
    uniforms = torch.rand(len(logits), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, logprobs = _draw(logits, uniforms, sampling_of(temperature=temperature))
    exact = torch.log_softmax(logits.double() / temperature, dim=1)
    cumulative = exact.exp().cumsum(dim=1)
    # Weights are fp32: a number this close to a boundary may fall on either side of it.
    slack = 1e-6
    found = ids.long()[:, None]
    assert bool((cumulative.gather(1, found)[:, 0] > uniforms - slack).all())
    below = (cumulative - exact.exp()).gather(1, found)[:, 0]
    assert bool((below <= uniforms + slack).all())
    # fp32 division by the temperature and fp32 sums of 128 weights: a few ulps of numbers up to 20.
    torch.testing.assert_close(logprobs, exact.gather(1, found)[:, 0], rtol=0, atol=4e-6)


def test_the_ends_of_the_unit_interval_stay_inside_the_kept_tokens() -> None:
    logits = torch.full((2, 300), -1000.0)
    logits[:, 140:150] = 0.0  # everything else underflows to a weight of zero
    uniforms = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    ids, logprobs = _draw(logits, uniforms, sampling_of())
    assert ids.tolist() == [140.0, 149.0]
    torch.testing.assert_close(logprobs.exp(), torch.full((2,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0)


def test_greedy_takes_the_largest_logit_and_its_logprob_at_temperature_one() -> None:
    logits = logits_of(1000)
    ids, logprobs = _draw(logits, torch.zeros(len(logits)), sampling_of(temperature=0.0))
    assert ids.long().tolist() == logits.argmax(dim=1).tolist()
    exact = torch.log_softmax(logits.double(), dim=1).amax(dim=1)
    # Only the sum over the vocabulary is fp32, in blocks: 1e-7 of a log-sum below 20.
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=1e-6)
