"""token_weight: sums over a step cut in any way, and masked positions that reach nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.losses import token_weights, weighted_sum

LENGTHS = [5, 3, 6]
MASKS = [[0, 1, 1, 1, 1], [0, 0, 1], [0, 1, 0, 1, 1, 0]]
NUM_LOSS_TOKENS = 8


def weights_of(chosen: list[int], aggregation) -> torch.Tensor:
    """token_weight of a micro-batch that holds some of the step's three sequences."""
    return token_weights(
        torch.tensor([value for i in chosen for value in MASKS[i]]).bool(),
        torch.tensor([0, *(LENGTHS[i] for i in chosen)]).cumsum(0).to(torch.int32),
        aggregation,
        num_loss_tokens=NUM_LOSS_TOKENS,
        num_sequences=3,
        max_length=10,
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_cutting_a_step_into_micro_batches_changes_no_weight(aggregation: str):
    whole = weights_of([0, 1, 2], aggregation)
    parts = torch.cat([weights_of([0], aggregation), weights_of([1, 2], aggregation)])
    assert torch.equal(whole, parts)
    total = {"token_mean": 1.0, "sequence_mean": 1.0, "constant_length": NUM_LOSS_TOKENS / 30}[aggregation]
    assert whole.sum().item() == pytest.approx(total, rel=1e-6)  # float32 sum of 8 numbers
    assert (whole[~torch.tensor([value for mask in MASKS for value in mask]).bool()] == 0).all()


def test_sequence_mean_gives_every_sequence_the_same_share():
    shares = [part.sum().item() for part in weights_of([0, 1, 2], "sequence_mean").split(LENGTHS)]
    assert shares == pytest.approx([1 / 3] * 3, rel=1e-6)  # float32


def test_a_step_without_loss_tokens_is_refused():
    with pytest.raises(ValueError, match="check the data's loss masks"):
        token_weights(
            torch.zeros(2, dtype=torch.bool),
            torch.tensor([0, 2]),
            "token_mean",
            num_loss_tokens=0,
            num_sequences=1,
            max_length=4,
        )
    with pytest.raises(ValueError, match="aggregation: expected"):
        weights_of([0], "token_means")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_stands_at_masked_positions_reaches_neither_value_nor_gradient(poison: float):
    loss = torch.tensor([1.0, poison, 3.0], requires_grad=True)
    value = weighted_sum(loss, torch.tensor([0.5, 0.0, 0.25]))
    value.backward()
    assert value.item() == 1.25
    assert loss.grad is not None
    assert loss.grad.tolist() == [0.5, 0.0, 0.25]
