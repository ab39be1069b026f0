"""A reference runs over the micro-batches of the losses that look at it, and over no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_sftrl.engine.policy import Part, _reference_states
from megatron_sftrl.losses.registry import build_loss


def test_a_reference_runs_for_the_parts_that_look_at_it_alone() -> None:
    ran: list[list[str]] = []

    def hidden_states(batches: list[Any]) -> list[Any]:
        ran.append(batches)
        return [torch.tensor(float(ord(batch))) for batch in batches]

    reference: Any = SimpleNamespace(hidden_states=hidden_states)
    with_kl = build_loss("grpo", {"kl_coefficient": 0.1})
    first, second = ("a", "b"), ("c", "d")
    given: Any = [(first, build_loss("sft")), (second, with_kl)]
    parts = [Part(batches=batches, loss=loss) for batches, loss in given]
    found = _reference_states(parts, reference)
    assert ran == [["c", "d"]]
    assert {number: chr(int(states)) for number, states in found.items()} == {2: "c", 3: "d"}
    assert _reference_states(parts[:1], reference) == {}
    assert _reference_states(parts, None) == {}
    assert len(ran) == 1
