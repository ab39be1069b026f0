"""The same code on one CUDA device: losses, training, placement of the reference, checkpoints, generation."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_sftrl.config.schema import ReferenceSection, RunConfig
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.models.architecture import from_section
from megatron_sftrl.types import Prefix, Prompt, SamplingParams
from tests.distributed import test_late_weights, test_mixed_lengths
from tests.distributed.test_layouts import LOSSES, make_config, step_batches, train
from tests.distributed.test_mixed_lengths import LONG, SHORT
from tests.distributed.test_packed_attention import PREFIXES, assert_equal, packed, sequence_by_sequence
from tests.e2e.product import run_product
from tests.e2e.project import make_project, metrics_of
from tests.unit.losses.test_golden import PATHS, errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def parallel() -> Iterator[ParallelContext]:
    from megatron_sftrl.engine.parallel import parallel_context

    with parallel_context(make_config({}).parallel) as context:
        yield context


# float64 and float32 bounds as on the CPU (tests/unit/losses/test_golden.py).
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("path", PATHS)
def test_every_loss_equals_its_truth_on_cuda(dtype: str, bound: float, path: str) -> None:
    found = errors(dtype, path, "cuda")
    assert not {case: error for case, error in found.items() if not all(e <= bound for e in error)}


@pytest.mark.parametrize("loss_name", LOSSES)
def test_a_cuda_run_follows_the_cpu_run(loss_name: str) -> None:
    code = (
        "import json, sys; from tests.distributed.test_layouts import train; "
        f"json.dump(train({{}}, {loss_name!r}, 1, {{}}), open(sys.argv[1], 'w'))"
    )
    out = ROOT / f".cpu_curve_{loss_name}.json"
    hidden = {**os.environ, "SFTRL_DEVICE": "cpu"}
    try:
        subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, env=hidden, check=True, timeout=300)
        expected = torch.tensor(json.loads(out.read_text()))
    finally:
        out.unlink(missing_ok=True)
    curve = torch.tensor(train({}, loss_name, 1, {}))
    # Two devices sum in different orders; 20 Adam steps carry the difference on.
    torch.testing.assert_close(curve[0], expected[0], rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(curve, expected, rtol=1e-3, atol=1e-4)


def bf16_config() -> RunConfig:
    config = make_config({}, loss="gift")
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})


def losses_of_a_run(parallel: ParallelContext, placement: str, num_steps: int) -> tuple[list[float], int]:
    """GIFT's losses in bf16 on one batch, and the bytes allocated between two steps."""
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.losses.registry import build_loss

    config = bf16_config()
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    section = ReferenceSection.model_validate({"kind": "frozen", "placement": placement})
    policy = PolicyEngine(architecture, config, parallel)
    reference = ReferenceModel(architecture, config, section, parallel)
    reference.copy_from(policy.chunks)
    loss = build_loss("gift", {"beta": 8.0})
    batches = step_batches(0, num_groups=1, group=0, multiple=1, num_microbatches=2)
    curve = []
    for step in range(num_steps):
        curve.append(policy.forward_backward(batches, loss, reference).loss)
        policy.optim_step(step, num_steps=num_steps)
    return curve, torch.cuda.memory_allocated()


def settled_memory() -> int:
    """Bytes allocated once what earlier runs left in reference cycles is gone."""
    gc.collect()
    return torch.cuda.memory_allocated()


def test_bf16_training_learns_and_an_offloaded_reference_changes_nothing_but_memory(
    parallel: ParallelContext,
) -> None:
    before = settled_memory()
    resident, resident_bytes = losses_of_a_run(parallel, "resident", 30)
    middle = settled_memory()
    offloaded, offloaded_bytes = losses_of_a_run(parallel, "offload", 30)
    assert resident[-1] < 0.8 * resident[0]
    assert offloaded == resident
    assert offloaded_bytes - middle < resident_bytes - before


@pytest.mark.parametrize("loss_name", ["sft", "gift"])
def test_no_micro_batch_waits_for_the_device(parallel: ParallelContext, loss_name: str) -> None:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.losses.registry import build_loss

    config = bf16_config()
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    policy = PolicyEngine(architecture, config, parallel)
    section = ReferenceSection.model_validate({"kind": "frozen", "placement": "offload"})
    reference = ReferenceModel(architecture, config, section, parallel)
    reference.copy_from(policy.chunks)
    loss = build_loss(loss_name, LOSSES[loss_name])
    counts = []
    for num_microbatches in (2, 2, 8):  # the first step compiles
        batches = step_batches(0, num_groups=1, group=0, multiple=1, num_microbatches=num_microbatches)
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                policy.forward_backward(batches, loss, reference if loss_name == "gift" else None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(each.message) for each in waits))
    # What the step asks for at its ends, however many micro-batches lie between them.
    assert counts[1] == counts[2] > 0


def test_a_checkpoint_on_cuda_resumes_bit_by_bit(parallel: ParallelContext, tmp_path: Path) -> None:
    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.losses.registry import build_loss

    config = bf16_config()
    assert config.model.architecture is not None
    architecture = from_section(config.model.architecture)
    store = CheckpointStore(tmp_path, parallel, keep_last=1)
    loss = build_loss("sft")

    def steps(policy: PolicyEngine, start: int) -> list[tuple[float, float]]:
        curve = []
        for step in range(start, start + 3):
            batches = step_batches(step, num_groups=1, group=0, multiple=1, num_microbatches=2)
            report = policy.forward_backward(batches, loss)
            curve.append((report.loss, policy.optim_step(step, num_steps=6).grad_norm))
        return curve

    policy = PolicyEngine(architecture, config, parallel)
    steps(policy, 0)
    path = store.save(TrainerState(step=3), policy, None)
    expected = steps(policy, 3)
    resumed = PolicyEngine(architecture, config, parallel)
    assert store.load(path, resumed, None).step == 3
    assert steps(resumed, 3) == expected
    for (name, ours), theirs in zip(
        resumed.chunks[0].named_parameters(), policy.chunks[0].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_greedy_generation_continues_with_the_likeliest_token(parallel: ParallelContext) -> None:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.in_process import InProcessEngine

    config = make_config({})
    assert config.model.architecture is not None
    policy = PolicyEngine(from_section(config.model.architecture), config, parallel, with_optimizer=False)
    prompts = [
        Prompt(id=number, tokens=tokens) for number, tokens in enumerate([(1, 2, 3), (4, 5, 6, 7, 8), (9,)])
    ]
    sampling = SamplingParams(temperature=0.0, max_new_tokens=6)
    engine = InProcessEngine(parallel, max_responses=2)
    engine.update(policy, version=0)
    together = engine.generate(prompts, sampling)
    for prompt, group in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], sampling)
        assert len(alone.rollouts[0].response_tokens) == sampling.max_new_tokens
        assert alone.rollouts[0].response_tokens == group.rollouts[0].response_tokens


@pytest.mark.parametrize("loss_name", ["sft", "curiosft"])
def test_a_fused_head_waits_for_its_weights(loss_name: str) -> None:
    expected, _, _ = test_late_weights.train(
        {"distributed_optimizer": True}, "off", loss_name, directory=None
    )
    curve, _, num_buckets = test_late_weights.train(
        test_late_weights.OVERLAPPED, "on", loss_name, directory=None
    )
    assert num_buckets > 4
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[LONG, SHORT], [SHORT, LONG]])
def test_a_long_microbatch_leaves_the_gradients_of_a_short_one(lengths: list[int]) -> None:
    expected, found = (
        test_mixed_lengths.step({}, [lengths], fused, "sft", tied=False, fails_first=False)
        for fused in ("off", "auto")
    )
    test_mixed_lengths.assert_same_gradients(found, expected)
    assert found.ways == {"output"}


@pytest.mark.parametrize("prefixes", [(), PREFIXES])
@pytest.mark.parametrize("window", [None, 5])
def test_packed_attention_equals_each_sequence_alone(
    window: int | None, prefixes: tuple[Prefix | None, ...]
) -> None:
    found = packed(1, window, device="cuda", prefixes=prefixes)
    assert_equal([found], sequence_by_sequence(window, prefixes))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_pipeline_stages_follow_one(tmp_path: Path) -> None:
    """Outputs are freed once they are sent, and sends overlap: neither ever happens on the CPU."""
    project = make_project(tmp_path / "project")
    losses = []
    for ranks in (1, 2):
        run_dir = tmp_path / f"pp{ranks}"
        run_product(
            "sft", str(project.yaml), f"run_dir={run_dir}", f"parallel.pp={ranks}",
            log=tmp_path / f"pp{ranks}.log", ranks=ranks,
        )  # fmt: skip
        losses.append(torch.tensor([step["loss"] for step in metrics_of(run_dir) if "loss" in step]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
