"""Which logits are taken for a shard, and which are refused."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.vocab_parallel import TokenDistribution
from tests.ranks import run_ranks
from tests.unit.vocab_parallel.dense import LABELS, V, distribution, logits, world


def refused(widths: tuple[int, ...], padded: int | None = None) -> str:
    """The error that this rank's width gets, or an empty text."""
    group, _, rank = world()
    try:
        TokenDistribution.from_logits(
            torch.zeros(2, widths[rank]), vocab_size=V, group=group, padded_vocab_size=padded
        )
    except ValueError as error:
        return str(error)
    return ""


def test_gathered_logits_are_refused_by_every_rank_with_the_way_out():
    for text in run_ranks(2, refused, (V, V)):
        assert "expected one shard" in text
        assert "group=None" in text


def test_widths_that_do_not_cover_the_vocabulary_are_refused():
    for text in run_ranks(2, refused, (50, 50)):
        if text:
            assert "expected a width of at least 51" in text
    assert "got 50" in run_ranks(2, refused, (50, 50))[0]
    assert all("got 40" in text for text in run_ranks(2, refused, (40, 40)))


@pytest.mark.parametrize("widths", [(51, 51), (51, 50), (64, 64), (100, 100)])
def test_padded_and_unpadded_last_shards_are_taken(widths: tuple[int, ...]):
    assert run_ranks(2, refused, widths) == ["", ""]


def test_padding_over_a_whole_rank_must_be_confirmed():
    assert all("padded_vocab_size=256" in text for text in run_ranks(2, refused, (128, 128)))
    assert run_ranks(2, refused, (128, 128), 256) == ["", ""]
    assert all("expected padded_vocab_size" in text for text in run_ranks(2, refused, (128, 128), 300))


def heavy_padding() -> torch.Tensor:
    """Log-probabilities and their gradient where the second rank holds only padding."""
    group, _, rank = world()
    whole = torch.nn.functional.pad(logits(1), (0, 256 - V), value=torch.nan)
    local = whole[:, rank * 128 : (rank + 1) * 128].clone().requires_grad_()
    p = TokenDistribution.from_logits(local, vocab_size=V, group=group, padded_vocab_size=256)
    value = p.logprobs(LABELS) + p.entropy() + p.mean_logprob()
    value.sum().backward()
    assert local.grad is not None
    assert p.top_k(3).values.shape == (6, 3)
    assert not local.grad.isnan().any()
    return value.detach()


def test_a_rank_with_nothing_but_padding_takes_part_in_every_sum():
    p = distribution(logits(1))
    truth = p.logprobs(LABELS) + p.entropy() + p.mean_logprob()
    for value in run_ranks(2, heavy_padding):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)  # float64 rounding only


def test_ids_outside_of_the_vocabulary_or_of_another_shape_are_refused():
    p = TokenDistribution.from_logits(torch.zeros(2, 8), vocab_size=5)
    with pytest.raises(ValueError, match=r"vocab_size = 5, got -100\.\.1"):
        p.logprobs(torch.tensor([1, -100]))
    with pytest.raises(ValueError, match=r"got 1\.\.5"):  # a padding column
        p.logprobs(torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"int64 \[T\] = \[2\], got torch.int64 \[3\]"):
        p.logprobs(torch.tensor([1, 2, 3]))


def test_distributions_of_different_columns_are_not_compared():
    p = TokenDistribution.from_logits(torch.zeros(2, 8), vocab_size=5)
    q = TokenDistribution.from_logits(torch.zeros(2, 8), vocab_size=6)
    with pytest.raises(ValueError, match="split both vocabularies alike"):
        p.kl_from(q)
    with pytest.raises(ValueError, match="same batch and layout"):
        p.kl_from(TokenDistribution.from_logits(torch.zeros(3, 8), vocab_size=5))


@pytest.mark.parametrize("tau", [0.0, -1.0, torch.ones(3)])
def test_a_temperature_that_is_not_positive_or_not_per_token_is_refused(tau: float | torch.Tensor):
    with pytest.raises(ValueError, match="tau: expected"):
        TokenDistribution.from_logits(torch.zeros(2, 8), vocab_size=8).tempered(tau)
