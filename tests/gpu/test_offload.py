"""Trainer and engine taking turns on the memory of one CUDA device."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.models.architecture import from_section
from megatron_sftrl.observability.watch import take_device_peak
from tests.distributed.test_layouts import make_config, step_batches
from tests.e2e.grpo_project import GrpoProject, make_grpo_project, samples_of
from tests.e2e.product import run_product
from tests.e2e.project import Metrics, make_project, metrics_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def has_vllm() -> bool:
    """vLLM itself, not its rebuild for the CPU."""
    try:
        return bool(importlib.metadata.version("vllm"))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture
def parallel() -> Iterator[ParallelContext]:
    from megatron_sftrl.engine.parallel import parallel_context

    with parallel_context(make_config({}).parallel) as context:
        yield context


def test_the_training_state_leaves_the_device_and_comes_back_bit_by_bit(parallel: ParallelContext) -> None:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    config = make_config({}, hidden_size=512, ffn_hidden_size=1024)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
    assert config.model.architecture is not None
    curves = []
    for leaves in (False, True):
        policy = PolicyEngine(from_section(config.model.architecture), config, parallel)
        state = policy.training_state
        assert state is not None
        num_elements = sum(each.numel() for chunk in policy.chunks for each in chunk.parameters())
        curve = []
        for step in range(4):
            batches = step_batches(step, num_groups=1, group=0, multiple=1, num_microbatches=2)
            report = policy.forward_backward(batches, build_loss("sft", {}))
            curve.append((report.loss, policy.optim_step(step, num_steps=4).grad_norm))
            if leaves:
                before = torch.cuda.memory_allocated()
                state.leave()
                # Gradients, weights, two moments, all fp32.
                assert before - torch.cuda.memory_allocated() >= 0.95 * 16 * num_elements
                state.come_back()
                assert torch.cuda.memory_allocated() >= before
        curves.append(curve)
    assert curves[0] == curves[1]


def test_the_peak_of_a_device_counts_what_was_given_back_since_and_starts_anew() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    take_device_peak(device)
    idle = take_device_peak(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    del block
    torch.cuda.empty_cache()
    assert take_device_peak(device) >= idle + 2**28
    assert take_device_peak(device) < idle + 2**28


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> GrpoProject:
    root = tmp_path_factory.mktemp("grpo")
    (root / "project").mkdir()
    return make_grpo_project(make_project(root / "project"), root)


def run(grpo: GrpoProject, run_dir: Path, *overrides: str) -> Metrics:
    run_product(
        *grpo.command(run_dir, "rollout.engine=in_process", *overrides), log=run_dir.with_suffix(".log")
    )
    return metrics_of(run_dir)


def test_a_run_with_offload_is_the_run_without_and_logs_both_peaks(grpo: GrpoProject, tmp_path: Path) -> None:
    stays = run(grpo, tmp_path / "stays")
    leaves = run(grpo, tmp_path / "leaves", "rollout.offload=true")
    assert samples_of(tmp_path / "leaves") == samples_of(tmp_path / "stays")
    assert [row["loss"] for row in leaves] == [row["loss"] for row in stays]
    for row in (*stays, *leaves):
        assert row["memory/train_peak_bytes"] > 0
        assert row["memory/generate_peak_bytes"] > 0


@pytest.mark.skipif(not has_vllm(), reason="vLLM for CUDA is not here")
def test_vllm_sleeps_while_the_trainer_trains_and_agrees_when_it_is_awake(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    metrics = run(
        grpo,
        tmp_path / "run",
        "model.architecture.head_dim=64",
        "model.dtype=bf16",
        "rollout.engine=vllm",
        "rollout.vllm.gpu_memory_utilization=0.3",
        "rollout.vllm.enforce_eager=true",
        "rollout.offload=true",
    )
    total = torch.cuda.mem_get_info()[1]
    for row in metrics:
        # bf16 kernels of two libraries; stale weights would give whole nats.
        assert row["mismatch/probe"] < 0.2
        # The engine takes its share of the device in its own turn only.
        assert row["memory/generate_peak_bytes"] > 0.25 * total
        assert row["memory/train_peak_bytes"] < row["memory/generate_peak_bytes"] - 0.2 * total
