"""Short runs that save and resume, for the checkpoint tests; every function here runs on every rank."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.models.architecture import from_section
from tests.distributed.test_layouts import make_config, step_batches

NUM_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Span:
    """Part of a run: load (when told), train steps [first, last), save at the end or before some steps."""

    parallel: dict
    first: int = 0
    last: int = NUM_STEPS
    load: str | None = None
    save: str | None = None
    save_before: tuple[int, ...] = ()
    keep_last: int = 2
    async_save: bool = False
    model: dict = field(default_factory=dict)
    optim: dict = field(default_factory=dict)
    dtype: str = "fp32"
    reference: str | None = None
    placement: str = "resident"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw: (loss, gradient norm) per step, and everything that it holds at the end."""

    metrics: list[tuple[float, float]]
    state: dict[str, Tensor]
    step: int


def run_span(span: Span) -> Outcome:
    """Train a part of a run on this rank."""
    from megatron_sftrl.engine.checkpoint import TrainerState
    from megatron_sftrl.losses.registry import build_loss

    with engines(span) as (parallel, policy, reference):
        state = TrainerState(step=span.first)
        if span.load is not None:
            store = open_store(span.load, parallel, span)
            path = store.latest()
            assert path is not None
            state = store.load(path, policy, reference)
        loss = build_loss("sft", {}) if span.reference is None else build_loss("curiosft", {"top_k": 16})
        metrics = []
        with contextlib.ExitStack() as ending:
            if span.save is not None:
                store = ending.enter_context(open_store(span.save, parallel, span))
            for step in range(state.step, span.last):
                if step in span.save_before:
                    store.save(TrainerState(step=step), policy, reference)
                draw_random_numbers()
                batches = step_batches(
                    step,
                    num_groups=parallel.dp_size,
                    group=parallel.dp_rank,
                    multiple=2 * parallel.cp_size * parallel.tp_size,
                    num_microbatches=4 if parallel.vp_size > 1 else 2,
                )
                report = policy.forward_backward(batches, loss, reference)
                done = policy.optim_step(step, num_steps=NUM_STEPS)
                if reference is not None and reference.is_due(step + 1):
                    policy.gather_parameters()
                    reference.follow(policy.chunks)
                metrics.append((report.loss, done.grad_norm))
            if span.save is not None:
                store.save(TrainerState(step=span.last, consumed_samples=8 * span.last), policy, reference)
        policy.gather_parameters()
        return Outcome(metrics=metrics, state=held_state(policy, reference), step=state.step)


def open_store(directory: str, parallel, span: Span):
    """The checkpoints of a span."""
    from megatron_sftrl.engine.checkpoint import CheckpointStore

    return CheckpointStore(Path(directory), parallel, keep_last=span.keep_last, async_save=span.async_save)


@contextlib.contextmanager
def engines(span: Span):
    """Parallel context, policy and reference of a span, taken down at the end."""
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel

    run = span_config(span)
    assert run.model.architecture is not None
    architecture = from_section(run.model.architecture)
    parallel = initialize_parallel(run.parallel)
    policy = PolicyEngine(architecture, run, parallel)
    reference = None
    if span.reference is not None:
        section = ReferenceSection.model_validate(
            {"kind": span.reference, "placement": span.placement, "decay": 0.5, "sync_every": 2}
        )
        reference = ReferenceModel(architecture, run, section, parallel)
        reference.copy_from(policy.chunks)
    yield parallel, policy, reference
    parallel_state.destroy_model_parallel()


def span_config(span: Span) -> RunConfig:
    """The configuration of a span."""
    run = make_config(span.parallel, **span.model)
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"dtype": span.dtype}),
            "optim": run.optim.model_copy(update=span.optim),
        }
    )


def held_state(policy, reference) -> dict[str, Tensor]:
    """Weights, optimizer state and reference of this rank, read without the checkpoint's own code."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {}
    for index, chunk in enumerate(policy.chunks):
        for name, parameter in chunk.named_parameters():
            state[f"policy.{index}.{name}"] = parameter.detach().clone()
    leaves = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    for leaf_index, leaf in enumerate(leaves):
        for group_index, group in enumerate(leaf.optimizer.param_groups):
            for index, main in enumerate(group["params"]):
                key = f"optimizer.{leaf_index}.{group_index}.{index}"
                state[f"{key}.main"] = main.detach().clone()
                for name, value in leaf.optimizer.state[main].items():
                    state[f"{key}.{name}"] = value.detach().clone()
    if reference is not None:
        for index, chunk in enumerate(reference.chunks):
            for name, parameter in chunk.named_parameters():
                state[f"reference.{index}.{name}"] = parameter.detach().clone()
                if (average := reference.averages().get(id(parameter))) is not None:
                    state[f"average.{index}.{name}"] = average.clone()
    state["rng"] = torch.get_rng_state()
    for name, tracked in get_cuda_rng_tracker().get_states().items():
        state[f"rng.{name}"] = tracked
    return state


def draw_random_numbers() -> None:
    """What dropout would do; without it no generator moves and a resume that forgets them goes unseen."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.rand(3)
    with get_cuda_rng_tracker().fork():
        torch.rand(3, device="cuda")  # lands on the CPU where there is no CUDA


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, read by torch alone in one process."""
    from torch.distributed import checkpoint as torch_checkpoint

    reader = torch_checkpoint.FileSystemReader(checkpoint)
    index = reader.read_metadata().state_dict_metadata
    tensors: dict = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in index.items()
    }
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
