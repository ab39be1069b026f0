"""CurioSFT's teacher in a whole run, against its release's update written down once more in plain float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.checkpoint_runs import stored_tensors
from tests.e2e.product import sftrl
from tests.e2e.project import Project, metrics_of
from tests.ranks import free_port, run_ranks

ALPHA, SYNC_STEPS = 0.99, 5  # the release's ref_model_mixup_alpha and ref_model_sync_steps
NUM_STEPS = 11
CURIOSFT = "loss={name: curiosft, top_k: 16, pivot: 3.0}"


def run(project: Project, run_dir: Path, *overrides: str) -> list[dict[str, torch.Tensor]]:
    """The tensors of the checkpoint after each step."""
    keep = f"checkpoint={{every: 1, keep_last: {NUM_STEPS}}}"
    steps = f"train={{steps: {NUM_STEPS}}}"
    sftrl("sft", str(project.yaml), f"run_dir={run_dir}", "data.valid=[]", CURIOSFT, steps, keep, *overrides)
    return [stored_tensors(path) for path in sorted((run_dir / "checkpoints").glob("step-*"))]


def weights(stored: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {key: value for key, value in stored.items() if key.startswith(f"{prefix}.")}
    return {key.removeprefix(f"{prefix}."): value for key, value in found.items()}


def released_teachers(
    stored: list[dict[str, torch.Tensor]], *, alpha: float, sync_steps: int
) -> list[dict[str, torch.Tensor]]:
    """The release's teacher after each step: it is updated ahead of every sync_steps-th step's forward."""
    # Not updated yet after the first step: the policy that training started from.
    teacher = {name: value.double() for name, value in weights(stored[0], "reference").items()}
    teachers = []
    for steps_done, checkpoint in enumerate(stored, start=1):
        if steps_done % sync_steps == 0:
            policy = weights(checkpoint, "policy")
            teacher = {
                name: (1.0 - alpha) * teacher[name] + alpha * policy[name].double() for name in teacher
            }
        teachers.append(teacher)
    return teachers


def test_the_default_teacher_is_that_of_the_release_over_several_updates(
    project: Project, tmp_path: Path
) -> None:
    stored = run(project, tmp_path / "run", "reference={kind: moving_average}")
    teachers = released_teachers(stored, alpha=ALPHA, sync_steps=SYNC_STEPS)
    for checkpoint, teacher in zip(stored, teachers, strict=True):
        for name, value in weights(checkpoint, "reference").items():
            # fp32 against float64: two roundings an update.
            torch.testing.assert_close(value.double(), teacher[name], rtol=3e-7, atol=1e-8)
    assert any((teachers[-1][name] - teachers[0][name]).abs().max() > 1e-3 for name in teachers[0])

    # The second term of the loss, step by step: policy and teacher before the step, on the step's own rows.
    arguments = (tmp_path / "run", stored, teachers, free_port())
    (found,) = run_ranks(1, distillation_terms, *arguments, group=False)
    seen = [row["curiosft/k2"] for row in metrics_of(tmp_path / "run")][1:]
    assert found == pytest.approx(seen, rel=1e-4)
    assert max(seen) > 1e-4


def distillation_terms(
    run_dir: Path,
    stored: list[dict[str, torch.Tensor]],
    teachers: list[dict[str, torch.Tensor]],
    port: int,
) -> list[float]:
    """K2 of steps 2, 3, ... with weights put into the engine from outside."""
    from megatron_sftrl.config.load import load_config
    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine.checkpoint.tensors import model_tensors
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.observability.run_directory import open_run_directory
    from megatron_sftrl.trainers.checked import checked_run
    from megatron_sftrl.trainers.demonstrations import open_demonstrations

    os.environ["MASTER_PORT"] = str(port)
    config = load_config(run_dir / "resolved.yaml")
    checked = checked_run(config)

    def put(chunks: Any, values: dict[str, torch.Tensor]) -> None:
        for place in model_tensors(chunks, prefix=""):
            assert place.data is not None
            whole = values[place.key.removeprefix(".")]
            begin, shape = place.global_offset, place.local_shape
            box = tuple(slice(a, a + n) for a, n in zip(begin, shape, strict=True))
            place.data.copy_(whole[box])

    terms = []
    with parallel_context(config.parallel) as parallel:
        data = open_demonstrations(checked, open_run_directory(config, is_writer=False), parallel)
        policy = PolicyEngine(checked.architecture, config, parallel, with_optimizer=False)
        frozen = ReferenceSection(kind="frozen")
        teacher = ReferenceModel(checked.architecture, config, frozen, parallel)
        for step in range(1, len(stored)):
            put(policy.chunks, weights(stored[step - 1], "policy"))
            put(teacher.chunks, teachers[step - 1])
            report = policy.evaluate(data.train.step(step).batches, checked.loss, teacher)
            terms.append(report.metrics["curiosft/k2"])
    return terms
