"""What a node's own memory has to hold: each byte of a checkpoint once, whichever of its ranks stores it."""

from __future__ import annotations

import pytest

from megatron_sftrl.apps.plan.job import Hardware
from megatron_sftrl.apps.plan.memory import plan_memory
from megatron_sftrl.apps.plan.model_state import grid_of
from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.models.architecture import from_section, num_parameters
from tests.unit.config.example import example

H100 = Hardware(gpu_memory=80e9)
LAYOUTS = [{}, {"tp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}, {"distributed_optimizer": True}]
LAYOUTS += [{"tp": 2, "cp": 2, "distributed_optimizer": True}]


def on_host(world_size: int, *overrides: str, **parallel: object) -> tuple[float, int]:
    """Bytes a node for the copies of an asynchronous save, and the parameters of the model."""
    run = example("model.dtype=bf16", *overrides)
    section = ParallelSection.model_validate(parallel)
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    run = run.model_copy(update={"parallel": section})
    plan = plan_memory(architecture, run, grid_of(section, world_size), H100)
    return plan.host_checkpoint, num_parameters(architecture)


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_one_node_copies_the_checkpoint_once(parallel: dict) -> None:
    # bf16 weights, fp32 weights and two moments: 14 bytes a parameter; padding and the fuller of two
    # pipeline stages come on top.
    found, num = on_host(8, "checkpoint.async_save=true", "reference=null", **parallel)
    slack = 2.0 if "pp" in parallel else 1.1
    assert 14 * num <= found <= slack * 14 * num


def test_a_moving_average_is_copied_too_and_a_frozen_reference_is_not() -> None:
    kinds = ("reference=null", "reference={kind: frozen}", "reference={kind: moving_average, decay: 0.9}")
    plain, frozen, moving = (on_host(8, "checkpoint.async_save=true", kind)[0] for kind in kinds)
    assert plain == frozen
    assert moving == pytest.approx(plain * 18 / 14, rel=0.02)  # its fp32 average, of which bf16 is made again


def test_more_nodes_share_the_optimizer_and_a_synchronous_save_copies_nothing() -> None:
    sharded = {"distributed_optimizer": True}
    one, num = on_host(8, "checkpoint.async_save=true", "reference=null", **sharded)
    two, _ = on_host(16, "checkpoint.async_save=true", "reference=null", **sharded)
    assert one - two == pytest.approx(6 * num, rel=0.1)
    assert on_host(8, "reference=null", **sharded)[0] == 0
