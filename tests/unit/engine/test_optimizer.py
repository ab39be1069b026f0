"""The learning rate as a function of the step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from megatron_sftrl.config.schema import OptimSection
from tests.ranks import run_ranks


def rate(step: int, settings: dict[str, Any], num_steps: int) -> float:
    from megatron_sftrl.engine import cpu_backend

    cpu_backend.install()
    from megatron_sftrl.engine.optimizer import learning_rate

    return learning_rate(step, OptimSection.model_validate({"lr": 2.0, **settings}), num_steps=num_steps)


def rates(settings: dict[str, Any], num_steps: int) -> list[float]:
    return [rate(step, settings, num_steps) for step in range(num_steps + 1)]


def test_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero() -> None:
    # A first step with learning rate 0 would be a wasted batch.
    assert run_ranks(1, rates, {"warmup_steps": 4}, 6)[0] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_goes_from_the_peak_to_the_minimum_ratio(schedule: str) -> None:
    curve = run_ranks(1, rates, {"schedule": schedule, "min_lr_ratio": 0.1, "warmup_steps": 2}, 12)[0]
    assert curve[2] == 2.0
    assert curve[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(curve[2:]))
    middle = 0.2 + 1.8 * (0.5 if schedule == "linear" else 0.5 * (1 + math.cos(math.pi / 2)))
    assert curve[7] == pytest.approx(middle)


def decayed_parameters(
    parallel: dict[str, object], decays_all: bool = False
) -> dict[str, tuple[float, float]]:
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models.architecture import from_section
    from tests.distributed.test_layouts import make_config

    config = make_config(parallel, family="qwen2")
    optim = config.optim.model_copy(
        update={"lr": 0.5, "weight_decay": 0.5, "warmup_steps": 0, "decay_all": decays_all}
    )
    config = config.model_copy(update={"optim": optim})
    assert config.model.architecture is not None
    policy = PolicyEngine(
        from_section(config.model.architecture), config, initialize_parallel(config.parallel)
    )
    named = dict(policy.chunks[0].named_parameters())
    for name, parameter in named.items():
        if name.endswith("bias"):
            parameter.data.fill_(1.0)
    before = {name: float(parameter.abs().sum()) for name, parameter in named.items()}
    for parameter in named.values():
        parameter.main_grad.zero_()
    policy.optim_step(0, num_steps=1)
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    return {name: (before[name], float(parameter.abs().sum())) for name, parameter in named.items()}


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    # Gradients are zero, so a parameter moves by its decay alone: factor 1 - lr * weight_decay = 0.75.
    for name, (before, after) in run_ranks(1, decayed_parameters, {})[0].items():
        is_decayed = not name.endswith("bias") and "norm" not in name
        expected = 0.75 * before if is_decayed else before
        # fp32 sums over a few thousand elements: 1e-6 is rounding, a missing decay is 0.25.
        assert after == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("is_distributed", [False, True])
def test_everything_decays_when_it_is_asked_for_on_one_process_and_sharded_over_two(
    is_distributed: bool,
) -> None:
    parallel = {"distributed_optimizer": True} if is_distributed else {}
    for found in run_ranks(2 if is_distributed else 1, decayed_parameters, parallel, True):
        assert any("norm" in name for name in found)
        for name, (before, after) in found.items():
            assert after == pytest.approx(0.75 * before, rel=1e-6), name


def test_a_cosine_over_more_steps_than_the_run_ends_on_the_way_down() -> None:
    """Four times the steps, 60 of them warm-up: after 534 of 2136 steps 0.877 of the peak is left."""
    settings = {"schedule": "cosine", "min_lr_ratio": 1e-4, "warmup_steps": 60, "schedule_steps": 2136}
    curve = run_ranks(1, rates, settings, 534)[0]
    progress = (533 - 60) / (2136 - 60)
    expected = 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * progress))
    assert curve[533] / max(curve) == pytest.approx(expected)
    assert expected == pytest.approx(0.877, abs=5e-4)
