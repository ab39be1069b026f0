"""Weights that arrive during the next forward: code that reads them by itself has to wait for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.vocab_parallel import output_layer
from tests.distributed.test_layouts import LOSSES, Curve, make_config, step_batches
from tests.ranks import run_ranks

NUM_STEPS = 4
OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Elements: the untied head, of 101 x 32, is in a bucket of its own.
SMALL_BUCKETS = {"megatron": {"bucket_size": 3000}}


def train(
    parallel: dict, fused: str, loss_name: str, directory: str | None
) -> tuple[Curve, list[Tensor], int]:
    """Curve, head at the end and number of buckets; checkpoints and a moving average between the steps."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models.architecture import from_section

    section = {"kind": "moving_average", "decay": 0.5, "sync_every": 1} if loss_name == "curiosft" else None
    config = make_config({**parallel, **SMALL_BUCKETS}, loss=loss_name, fused=fused, reference=section)
    assert config.model.architecture is not None
    architecture, context = from_section(config.model.architecture), initialize_parallel(config.parallel)
    loss = build_loss(loss_name, LOSSES[loss_name])
    curve: Curve = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "logits_bytes", lambda row_bytes, _: 7 * row_bytes)
        policy = PolicyEngine(architecture, config, context)
        reference = None
        if config.reference is not None:
            reference = ReferenceModel(architecture, config, config.reference, context)
            reference.copy_from(policy.chunks)
        store = None if directory is None else CheckpointStore(Path(directory), context, keep_last=1)
        for step in range(NUM_STEPS):
            batches = step_batches(step, num_groups=2, group=context.dp_rank, multiple=1, num_microbatches=2)
            report = policy.forward_backward(batches, loss, reference)
            update = policy.optim_step(step, num_steps=NUM_STEPS)
            if reference is not None:
                reference.follow(policy.chunks)
            if store is not None and step == 1:
                store.save(TrainerState(step=step + 1), policy, reference)
            curve.append((report.loss, update.grad_norm, report.metrics["entropy"]))
    heads = everywhere(policy.chunks[0].output_weight())
    num_buckets = len(policy.wrapped[0].bucket_groups)  # type: ignore[union-attr]
    parallel_state.destroy_model_parallel()
    return curve, heads, num_buckets


def everywhere(value: Tensor) -> list[Tensor]:
    """The value of every rank."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.detach().contiguous())
    return values


@pytest.mark.parametrize(("loss_name", "saves"), [("sft", False), ("sft", True), ("curiosft", False)])
def test_a_fused_run_whose_head_arrives_late_is_the_run_without_overlap(
    loss_name: str, saves: bool, tmp_path: Path
) -> None:
    directory = str(tmp_path / "checkpoints") if saves else None
    plain = {"distributed_optimizer": True}
    expected, _, _ = run_ranks(2, train, plain, "off", loss_name, None)[0]
    curve, heads, num_buckets = run_ranks(2, train, OVERLAPPED, "on", loss_name, directory)[0]
    assert num_buckets > 4
    # Other orders of fp32 sums move these by 1e-6; the head of the step before moves the loss by 1e-3.
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=2e-5, atol=1e-5)
    assert torch.equal(*heads)


def late_reads() -> dict[str, tuple[bool, bool]]:
    """By reader: the ranks' weights differ where they lie after an update, and agree where they are read."""
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine import model as engine_model
    from megatron_sftrl.engine.checkpoint.tensors import model_tensors
    from megatron_sftrl.engine.live_weights import live_weights
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models.architecture import from_section

    config = make_config({**OVERLAPPED, **SMALL_BUCKETS})
    assert config.model.architecture is not None
    architecture, context = from_section(config.model.architecture), initialize_parallel(config.parallel)
    loss = build_loss("sft")
    section = ReferenceSection(kind="moving_average", decay=0.0)
    batches = step_batches(0, num_groups=2, group=context.dp_rank, multiple=1, num_microbatches=1)
    policy = PolicyEngine(architecture, config, context)
    model = policy.chunks[0]
    reference = ReferenceModel(architecture, config, section, context)

    def flat(tensors: object) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors])  # type: ignore[attr-defined]

    def copied() -> Tensor:
        reference.copy_from(policy.chunks)
        return flat(reference.chunks[0].parameters())

    def followed() -> Tensor:
        reference.follow(policy.chunks)
        return flat(reference.chunks[0].parameters())

    def decoded() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_model, "new_token_states", lambda own, *_: flat(own.parameters()).clone())
            return model.new_token_states(batches[0].tokens, None)  # type: ignore[arg-type]

    def gathered() -> Tensor:
        policy.gather_parameters()
        return flat(model.parameters())

    readers: dict[str, Callable[[], Tensor]] = {
        "the head": lambda: model.output_weight().clone(),
        "a checkpoint": lambda: flat(tensor.data for tensor in model_tensors(policy.chunks, prefix="")),
        "an engine's update": lambda: flat(
            view for _, view in live_weights(policy.chunks, architecture)._views()
        ),
        "a copy": copied,
        "a moving average": followed,
        "a decoding step": decoded,
        "gather_parameters": gathered,
    }
    found = {}
    for looks_between in (False, True):
        for name, read in readers.items():
            policy.forward_backward(batches, loss)
            if looks_between:
                # What is gathered between backward and update is old afterwards.
                policy.gather_parameters()
            policy.optim_step(0, num_steps=100)
            lying = everywhere(flat(model.parameters()))
            read_there = everywhere(read())
            key = f"{name}, looked at before the update" if looks_between else name
            found[key] = (not torch.equal(*lying), torch.equal(*read_there))
    parallel_state.destroy_model_parallel()
    return found


def test_all_that_read_weights_between_steps_read_every_ranks_update() -> None:
    for name, (differ, are_one) in run_ranks(2, late_reads)[0].items():
        assert differ, f"{name}: the ranks have the same weights without waiting: the test is blind"
        assert are_one, f"{name} reads weights of the step before"
