"""What an update of GRPO is made of when demonstrations are learned beside its responses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sftrl.config.data import SftTermSection
from megatron_sftrl.data.loader import StepData
from megatron_sftrl.engine.checkpoint import TrainerState
from megatron_sftrl.engine.objective import StepReport
from megatron_sftrl.engine.optimizer import OptimStep
from megatron_sftrl.engine.policy import Part
from megatron_sftrl.trainers.demonstrations import SftTerm
from megatron_sftrl.trainers.grpo import GrpoTrainer, Update
from megatron_sftrl.types import TokenBatch


def step_data(value: float) -> StepData:
    """One micro-batch of two loss tokens that weigh 1/2 each."""
    batch = TokenBatch(
        tokens=torch.zeros(2, dtype=torch.int64),
        labels=torch.zeros(2, dtype=torch.int64),
        positions=torch.arange(2),
        loss_mask=torch.ones(2, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        token_weight=torch.full((2,), 0.5),
        advantages=torch.full((2,), value),
    )
    return StepData(
        batches=(batch,),
        rows=(0, 1, 2, 3),
        microbatch_rows=(((0, 1, 2, 3),),),
        num_sequences=4,
        num_loss_tokens=2,
        num_tokens=2,
        num_padded_tokens=2,
    )


def one_update(mu: dict, data: StepData | None, *, consumed: int = 8) -> tuple[list[Part], list[Update], Any]:
    """The parts that the policy was given, what came of them, and the run; updates are numbered by draws."""
    given: list[Part] = []

    def forward_backward_parts(parts: list[Part], reference: object) -> list[StepReport]:
        given.extend(parts)
        return [
            StepReport(weight=1.0, loss=1.0 + place, metrics={}, nonfinite_microbatches=())
            for place in range(len(parts))
        ]

    section = SftTermSection.model_validate(
        {"data": {"train": ["x"], "max_length": 8}, "global_size": 4, "mu": mu}
    )
    shown: Any = SimpleNamespace(step=lambda number: step_data(float(number)))
    loss: Any = "of demonstrations"
    run: Any = SimpleNamespace(
        state=TrainerState(step=3, consumed_demonstrations=consumed),
        loss="of responses",
        reference=None,
        parallel=SimpleNamespace(pp_size=1),
        policy=SimpleNamespace(forward_backward_parts=forward_backward_parts),
        optimize=lambda step, report: OptimStep(grad_norm=report.loss, lr=0.1, is_skipped=False),
        check_learning=lambda report, **_: None,
    )
    trainer = object.__new__(GrpoTrainer)
    trainer.run = run
    trainer.sft_term = SftTerm(section=section, loss=loss, train=shown, fingerprint="")
    return given, trainer._one_update(data), run


def weight(part: Part) -> float:
    return sum(float(batch.token_weight.sum()) for batch in part.batches)


def test_responses_count_one_minus_mu_and_the_next_demonstrations_mu() -> None:
    parts, (update,), run = one_update({"peak": 0.3, "valley": 0.3}, step_data(-1.0))
    assert [part.loss for part in parts] == ["of responses", "of demonstrations"]
    assert [weight(part) for part in parts] == pytest.approx([0.7, 0.3])
    assert parts[0].batches[0].advantages[0] == -1.0  # type: ignore[index]
    assert parts[1].batches[0].advantages[0] == 2.0, "eight are behind us: the third draw of four"  # type: ignore[index]
    assert run.state.consumed_demonstrations == 12
    assert (update.loss, update.optim.grad_norm) == (3.0, 3.0)
    assert update.responses is not None
    assert update.demonstrations is not None
    assert (update.responses.loss, update.demonstrations.loss) == (1.0, 2.0)


def test_without_anything_to_learn_from_responses_demonstrations_are_learned_alone() -> None:
    parts, (update,), _ = one_update({"peak": 0.3, "valley": 0.3}, None)
    assert [part.loss for part in parts] == ["of demonstrations"]
    assert [weight(part) for part in parts] == pytest.approx([0.3])
    assert update.responses is None
    assert update.demonstrations is not None


def test_at_mu_0_an_update_is_that_of_a_run_without_demonstrations() -> None:
    data = step_data(-1.0)
    parts, (update,), run = one_update({"peak": 0.3, "valley": 0.0, "decay_steps": 2}, data)
    assert [part.batches for part in parts] == [data.batches], "the very same numbers"
    assert run.state.consumed_demonstrations == 8
    assert update.demonstrations is None
    assert one_update({"peak": 0.3, "valley": 0.0, "decay_steps": 2}, None)[1] == []
