"""Which mini-batches are looked at ahead of a step's first update, and who learns from whose own forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_sftrl.trainers import grpo
from megatron_sftrl.trainers.grpo import GrpoTrainer


def seen_of(updates: list[tuple[str, float | None]], signals: str, *, mu: float, passes: int) -> list[str]:
    """The mini-batches that were looked at ahead; `updates` gets each update with its `sampled_at`.

    Args:
        signals: a letter for each mini-batch, a capital one where there is something to learn.
    """
    looked: list[str] = []

    def looks(policy: Any, data: str, ask: object) -> dict[int, list[list[float]]]:
        looked.append(data)
        return {0: [[-1.0], [0.5]]}

    def one_update(data: str | None, *, sampled_at: float | None) -> list[Any]:
        if data is not None or mu:
            updates.append((data or "shown", sampled_at))
        return [SimpleNamespace(seen={0: [[-2.0], [0.25]]})] if data is not None or mu else []

    trainer = object.__new__(GrpoTrainer)
    as_letter: Any = lambda part: part[0].row  # noqa: E731
    stubs = {
        "_looks_ahead": False,
        "batches": SimpleNamespace(has_signal=lambda part: as_letter(part).isupper(), lay_out=as_letter),
        "config": SimpleNamespace(rollout=SimpleNamespace(passes=passes)),
        "sampling": SimpleNamespace(temperature=0.7),
        "run": SimpleNamespace(policy=None, state=SimpleNamespace(step=0)),
        "sft_term": SimpleNamespace(section=SimpleNamespace(mu=SimpleNamespace(at=lambda step: mu))),
        "_one_update": one_update,
    }
    vars(trainer).update(stubs)
    nothing: Any = None
    parts = [
        [grpo.Response(group=0, row=letter, rollout=nothing, scored=nothing)]  # type: ignore[arg-type]
        for letter in signals
    ]
    with mock.patch.object(grpo, "look_at_tokens", looks):
        scored, _ = trainer._update(trainer._with_old_logprobs(parts))
    assert [bool(each.old_logprobs) for each in scored] == [letter.isupper() for letter in signals]
    return looked


@pytest.mark.parametrize(
    ("signals", "mu", "ahead", "own"),
    [
        ("A", 0.0, "", "A"),
        ("ABC", 0.0, "BC", "A"),
        ("aBcD", 0.0, "D", "B"),
        ("AB", 0.3, "B", "A"),
        ("aBC", 0.3, "BC", ""),  # demonstrations move the weights before B is learned
        ("ab", 0.0, "", ""),
        ("ab", 0.3, "", ""),
    ],
)
def test_all_but_the_first_update_need_a_forward_before_it(
    signals: str, mu: float, ahead: str, own: str
) -> None:
    updates: list[tuple[str, float | None]] = []
    assert "".join(seen_of(updates, signals, mu=mu, passes=2)) == ahead
    assert "".join(name for name, temperature in updates if temperature == 0.7) == own
    assert [temperature for _, temperature in updates[1:]] == [None] * len(updates[1:])
    learned = [letter for letter in signals if letter.isupper()]
    assert [name for name, _ in updates if name != "shown"] == learned * 2
