"""A reference whose weights wait in host memory computes the same, copies nothing back and leaves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_sftrl.config.schema import ReferenceSection
from megatron_sftrl.models.architecture import from_section
from tests.distributed.test_layouts import make_config, step_batches
from tests.distributed.test_offload import storage_bytes
from tests.grid import cases
from tests.ranks import run_ranks

NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw.

    Args:
        curve: (loss, gradient norm) of each step.
        between: bytes of tensors' memory after the first step and after the last.
        away: by name, of the parameters that were on the device when the policy's forward began.
        weights: bytes of the reference's weights.
        returned: parameters whose host memory was written to by steps (not by follow), or has moved.
    """

    curve: list[tuple[float, float]]
    between: list[int]
    away: set[str]
    weights: int
    returned: list[str]


def run(parallel: dict, section: dict, dtype: str, model: dict, on_host: bool) -> Outcome:
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import HostWeights, ReferenceModel
    from megatron_sftrl.losses.registry import build_loss

    config = make_config(parallel, **model)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    assert config.model.architecture is not None
    context = initialize_parallel(config.parallel)
    architecture = from_section(config.model.architecture)
    policy = PolicyEngine(architecture, config, context)
    reference = ReferenceModel(architecture, config, ReferenceSection.model_validate(section), context)
    assert reference._host is None, "the CPU's memory is the host's: nothing moves there"
    if on_host:
        # The device of this run is another place in the same memory.
        reference._host = HostWeights(reference.chunks, context.device)
    reference.copy_from(policy.chunks)
    named = {
        f"{index}.{name}": weight
        for index, chunk in enumerate(reference.chunks)
        for name, weight in chunk.named_parameters()
    }
    home = {name: weight.data_ptr() for name, weight in named.items()}
    away: set[str] = set()

    def look() -> None:
        away.update(name for name, weight in named.items() if weight.data_ptr() != home[name])

    policy.on_microbatch = look
    curve, between, returned = [], [], []
    for step in range(NUM_STEPS):
        batches = step_batches(
            step, num_groups=1, group=0, multiple=1, num_microbatches=max(2, context.pp_size)
        )
        written = {name: weight.data._version for name, weight in named.items()}
        report = policy.forward_backward(batches, build_loss("gift", {"beta": 4.0}), reference)
        returned += [name for name, weight in named.items() if weight.data_ptr() != home[name]]
        returned += [name for name, weight in named.items() if weight.data._version != written[name]]
        curve.append((report.loss, policy.optim_step(step, num_steps=NUM_STEPS).grad_norm))
        if reference.is_due(step + 1):
            reference.follow(policy.chunks)
        between.append(storage_bytes())
    outcome = Outcome(
        curve=curve,
        between=[between[0], between[-1]],
        away=away,
        weights=sum(weight.nbytes for weight in named.values()),
        returned=returned,
    )
    parallel_state.destroy_model_parallel()
    return outcome


FROZEN = {"kind": "frozen", "placement": "offload"}
AVERAGE = {"kind": "moving_average", "decay": 0.5, "placement": "offload"}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    "frozen": (1, {}, FROZEN, "bf16", {}),
    "frozen, tied": (1, {}, FROZEN, "bf16", {"tie_embeddings": True}),
    "average": (1, {}, AVERAGE, "bf16", {}),
    "average in fp32": (1, {}, AVERAGE, "fp32", {}),
    "frozen, virtual pipeline": (2, {"pp": 2, "vp": 2}, FROZEN, "bf16", {}),
}


@pytest.mark.parametrize("name", cases(CASES, rarely=["frozen", "average"]))
def test_weights_that_wait_on_the_host_change_no_bit_and_are_copied_one_way(name: str) -> None:
    world_size, parallel, section, dtype, model = CASES[name]
    resident, waiting = (
        run_ranks(world_size, run, parallel, section, dtype, model, on_host) for on_host in (False, True)
    )
    for rank, (ours, truth) in enumerate(zip(waiting, resident, strict=True)):
        assert ours.curve == truth.curve
        assert ours.returned == []
        # One copy, as without the host's: what was on the device is gone.
        more = [here - there for here, there in zip(ours.between, truth.between, strict=True)]
        assert max(map(abs, more)) < 0.5 * ours.weights
        last = world_size - 1
        head = "embedding.word_embeddings" if "tie_embeddings" in model else "output_layer"
        expected = {f"{int(world_size == 2)}.{head}.weight"} if rank == last else set()
        assert ours.away == expected
        assert truth.away == set()
    assert len({loss for loss, _ in waiting[0].curve}) == NUM_STEPS


def test_a_layer_reads_what_was_brought_in() -> None:
    (differences,) = run_ranks(1, poisoned_run)
    assert all(differences)


def poisoned_run() -> list[bool]:
    """Whether the reference's states change when a layer's copy on the device is changed after it came."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.reference import HostWeights, ReferenceModel

    config = make_config({})
    assert config.model.architecture is not None
    context = initialize_parallel(config.parallel)
    section = ReferenceSection.model_validate(FROZEN)
    reference = ReferenceModel(from_section(config.model.architecture), config, section, context)
    reference._host = HostWeights(reference.chunks, context.device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.chunks[0].parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    batches = step_batches(0, num_groups=1, group=0, multiple=1, num_microbatches=1)
    (truth,) = reference.hidden_states(batches)
    reference.finish_step()
    differences = []
    for layer in reference.chunks[0].decoder.layers:

        def poison(module: torch.nn.Module, inputs: object) -> None:
            next(module.parameters()).data.zero_()

        handle = layer.register_forward_pre_hook(poison)
        (found,) = reference.hidden_states(batches)
        handle.remove()
        reference.finish_step()
        (again,) = reference.hidden_states(batches)
        reference.finish_step()
        differences.append(not torch.equal(found, truth) and torch.equal(again, truth))
    parallel_state.destroy_model_parallel()
    return differences
