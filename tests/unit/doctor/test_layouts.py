"""A cut loses no token and no column, and gives a loss nothing that it did not ask for."""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.apps.doctor.case import LENGTHS, VOCAB_SIZE, Layout, draw_case, groups_of, pieces_of
from megatron_sftrl.losses.registry import NEEDS


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=3, padding="huge"),
        Layout(tp=3, padding="heavy"),
        Layout(microbatches=6, is_reversed=True),
        Layout(dp=2, cp=2, tp=2, pp=2, microbatches=3, padding="-inf"),
    ],
    ids=str,
)
def test_every_logit_is_on_one_rank(layout: Layout) -> None:
    case = draw_case(0, ("reference",))
    pieces = pieces_of(case, layout)
    assert len(pieces) == layout.world_size
    assert not any(pieces[: layout.world_size - layout.world_size // layout.pp])
    seen = torch.zeros(sum(LENGTHS), VOCAB_SIZE)
    for piece in (piece for own in pieces for piece in own):
        columns = slice(piece.first_column, piece.first_column + piece.num_columns)
        seen[piece.rows, columns] += 1
        assert torch.equal(piece.policy[:, : piece.num_columns].float(), case.policy[piece.rows, columns])
        assert torch.equal(piece.batch.labels, case.batch.labels[piece.rows])
        assert piece.batch.cu_seqlens[-1] == len(piece.rows)
    assert (seen == 1).all()


def test_groups_follow_the_order_of_the_ranks() -> None:
    groups = groups_of(Layout(tp=2, cp=2, dp=2))
    assert groups.tp == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups.cp == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert (groups_of(Layout(dp=2)).tp, groups_of(Layout(dp=2)).cp) == ((), ())


def test_a_case_holds_what_was_asked_for_and_nothing_else() -> None:
    case = draw_case(0, ("advantages",))
    given = {name for name in NEEDS if getattr(case if name == "reference" else case.batch, name) is not None}
    assert given == {"advantages"}
    assert case.batch.token_weight.sum().item() == pytest.approx(1.0)
    assert 0 < case.batch.loss_mask.sum() < case.batch.num_tokens
    assert torch.equal(case.policy, draw_case(0, NEEDS).policy)
    assert not torch.equal(case.policy, draw_case(1, NEEDS).policy)
