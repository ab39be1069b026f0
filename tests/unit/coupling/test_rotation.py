"""Leading singular vectors and the angles between them, against torch's own decomposition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_sftrl.apps.coupling.rotation import (
    kind_of,
    layer_of,
    leading,
    principal_angles,
    turn_between,
)

RANK = 5


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, angle: float, first: int, second: int) -> Tensor:
    """In the plane of two axes."""
    turned = torch.eye(size, dtype=torch.float64)
    turned[first, first] = turned[second, second] = math.cos(angle)
    turned[first, second], turned[second, first] = -math.sin(angle), math.sin(angle)
    return turned


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (20, 20)])
def test_the_leading_vectors_are_those_of_the_full_decomposition(shape: tuple[int, int]) -> None:
    whole = matrix(*shape, seed=0)
    found = leading(whole, RANK)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(found.values, values[:RANK], rtol=1e-12, atol=0)
    for ours, theirs in ((found.left, left[:, :RANK]), (found.right, right[:RANK].T)):
        torch.testing.assert_close(ours.T @ ours, torch.eye(RANK, dtype=torch.float64))
        torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-10)


def test_a_matrix_of_lower_rank_has_as_many_vectors_as_its_rank() -> None:
    low = matrix(20, 2, seed=0) @ matrix(2, 30, seed=1)
    assert leading(low.float(), RANK).values.shape == (2,)
    assert leading(torch.zeros(4, 6), RANK).values.shape == (0,)
    assert leading(matrix(3, 8, seed=0), RANK).values.shape == (3,)


def test_angles_are_those_of_the_decomposition() -> None:
    before, after = matrix(40, 24, seed=0), matrix(40, 24, seed=1)
    one, other = leading(before, RANK), leading(after, RANK)
    turn = turn_between(one, other, after - before, before)
    vectors = [torch.linalg.svd(each) for each in (before, after)]
    for side, place in (("left", 0), ("right", 2)):
        bases = [each[place] if place == 0 else each[place].T for each in vectors]
        cosines = torch.linalg.svdvals(bases[0][:, :RANK].T @ bases[1][:, :RANK])
        expected = torch.arccos(cosines.clamp(max=1)).tolist()
        assert getattr(turn, side) == pytest.approx(expected, abs=1e-9)
    assert turn.weights == pytest.approx(float((after - before).norm() / before.norm()))
    assert turn.values == pytest.approx(float((other.values - one.values).norm() / one.values.norm()))


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.3, 1.5])
def test_an_angle_of_any_size_is_found(angle: float) -> None:
    one = torch.eye(9, 3, dtype=torch.float64)
    other = rotation(9, angle, 1, 7) @ one
    flipped = other[:, [2, 0, 1]] * torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    assert principal_angles(one, flipped).tolist() == pytest.approx([0, 0, angle], rel=1e-3, abs=1e-15)


def test_only_the_side_that_turned_has_an_angle() -> None:
    before = matrix(12, 18, seed=0)
    angle = 0.2
    turned = rotation(12, angle, 0, 1) @ before
    turn = turn_between(leading(before, RANK), leading(turned, RANK), turned - before, before)
    assert turn.right == pytest.approx([0.0] * RANK, abs=1e-6)
    assert 0.01 < turn.left[-1] <= angle + 1e-9
    assert turn.values == pytest.approx(0, abs=1e-12)


def test_the_names_of_matrices_say_their_kind_and_layer() -> None:
    expert = "model.layers.3.mlp.experts.11.gate_proj.weight"
    assert kind_of(expert) == "layers.mlp.experts.gate_proj"
    assert layer_of(expert) == "3"
    assert kind_of("model.embed_tokens.weight") == layer_of("model.embed_tokens.weight") == "embed_tokens"
    assert kind_of("lm_head.weight") == "lm_head"
