"""train.deterministic: what it sets, what it refuses, and that it arrives in a run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from megatron_sftrl.engine.determinism import choose_kernels, named_operator
from megatron_sftrl.errors import UserError
from tests.distributed.mixture_runs import QWEN3_MOE
from tests.distributed.test_layouts import make_config, step_batches
from tests.ranks import run_ranks

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    """None of the variables are there, and nothing stays behind."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that its absence is put back, too
        monkeypatch.delenv(name)
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def test_torch_and_the_libraries_are_told() -> None:
    choose_kernels(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert [os.environ[name] for name in NAMES] == [":4096:8", "0", "^NVLS"]


def test_a_run_without_it_sets_nothing_and_ends_what_the_run_before_set() -> None:
    torch.use_deterministic_algorithms(True)
    choose_kernels(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not set(NAMES) & os.environ.keys()


def test_what_the_user_set_and_is_as_good_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    choose_kernels(deterministic=True)
    assert [os.environ[name] for name in NAMES] == [":16:8", "0", "Tree"]


@pytest.mark.parametrize(("name", "value"), [(NAMES[0], ":0:0"), (NAMES[1], "1"), (NAMES[2], "NVLS")])
def test_an_environment_that_says_the_opposite_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"variable {name} to be .*, got '{value}': unset it"):
        choose_kernels(deterministic=True)


def put_twice() -> None:
    """An operator of which torch has no deterministic kernel on any device."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_an_operator_that_cannot_obey_is_named() -> None:
    choose_kernels(deterministic=True)
    refused = pytest.raises(UserError, match="keep one order of sums, got put_, which has no such kernel")
    with refused, named_operator():
        put_twice()


def test_other_failures_are_passed_on() -> None:
    choose_kernels(deterministic=True)
    with pytest.raises(RuntimeError, match="shape"), named_operator():
        torch.zeros(3).view(2)
    choose_kernels(deterministic=False)
    with named_operator():
        put_twice()


def train(model: dict) -> tuple[bool, bool, list[tuple[float, float]], list[bytes]]:
    """Whether torch and Megatron were told; losses and gradient norms, and the weights at the end."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models.architecture import from_section

    run = make_config({}, loss="sft", **model)
    run = run.model_copy(update={"train": run.train.model_copy(update={"deterministic": True})})
    assert run.model.architecture is not None
    context = initialize_parallel(run.parallel, deterministic=run.train.deterministic)
    is_told = torch.are_deterministic_algorithms_enabled()
    policy = PolicyEngine(from_section(run.model.architecture), run, context)
    curve = []
    for step in range(3):
        batches = step_batches(step, num_groups=1, group=0, multiple=1, num_microbatches=2)
        loss = policy.forward_backward(batches, build_loss("sft", {})).loss
        curve.append((loss, policy.optim_step(step, num_steps=3).grad_norm))
    weights = [
        bytes(each.detach().view(torch.uint8).flatten().tolist()) for each in policy.chunks[0].parameters()
    ]
    parallel_state.destroy_model_parallel()
    choose_kernels(deterministic=False)
    for name in NAMES:
        os.environ.pop(name, None)
    return is_told, policy.config.deterministic_mode, curve, weights


@pytest.mark.parametrize("model", [{}, QWEN3_MOE], ids=["dense", "mixture"])
def test_a_run_and_its_repetition_are_equal_bit_by_bit(model: dict) -> None:
    (first,), (second,) = (run_ranks(1, train, model) for _ in range(2))
    assert first[:2] == (True, True)
    assert len(first[2]) == 3
    assert first == second
