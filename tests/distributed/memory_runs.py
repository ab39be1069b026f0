"""What a small run really holds in memory, for the tests of the planner; this runs on every rank."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.models import architecture_of
from megatron_sftrl.types import Prefix, TokenBatch
from tests.distributed.uncounted_collectives import LABEL, UncountedCollectives

if TYPE_CHECKING:
    from megatron_sftrl.engine.parallel import ParallelContext
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one rank.

    Args:
        parameters, gradients: storages behind the policy's parameters and Megatron's gradient buffers.
        optimizer: fp32 weights and moments after a step, without torch's step counters.
        reference, average: storages of its parameters, and of the fp32 average that they are rounded from.
        pp_rank, dp_cp_rank, edp_rank: the rank's place.
        peak: most that a step's forward and backward held beyond what stood there before it.
    """

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    average: int
    pp_rank: int
    dp_cp_rank: int
    edp_rank: int
    peak: int


def measure(
    run: RunConfig, *, num_tokens: int, num_sequences: int, num_microbatches: int, prompt: int = 0
) -> Held:
    """Two steps on random tokens; the second, when Adam's moments exist, is measured.

    Args:
        prompt: tokens that stand once in front of all sequences of a micro-batch.
    """
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.losses.registry import build_loss

    context = initialize_parallel(run.parallel)
    policy, reference = policy_and_reference(run, context)
    loss = build_loss(run.loss.name, run.loss.options)
    batches = [
        packed(
            num_tokens,
            num_sequences,
            policy.architecture.vocab_size,
            seed=context.dp_rank * 100 + number,
            prompt=prompt,
        )
        for number in range(num_microbatches)
    ]

    def step() -> None:
        policy.forward_backward(batches, loss, reference)

    step()
    policy.optim_step(0, num_steps=2)
    gc.collect()
    peak = allocated_peak(step)
    held = Held(
        parameters=storage_bytes(p for chunk in policy.chunks for p in chunk.parameters()),
        gradients=storage_bytes(
            p.main_grad  # type: ignore[attr-defined]
            for chunk in policy.chunks
            for p in chunk.parameters()
            if p.requires_grad
        ),
        optimizer=storage_bytes(optimizer_tensors(policy))
        - storage_bytes(optimizer_tensors(policy), within=list(policy_storages(policy))),
        reference=storage_bytes(
            p
            for chunk in (reference.chunks if reference and not reference.has_adapters else [])
            for p in chunk.parameters()
        ),
        average=storage_bytes((reference.averages() if reference else {}).values()),
        pp_rank=context.pp_rank,
        dp_cp_rank=context.dp_cp_group.rank(),
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
        peak=peak,
    )
    parallel_state.destroy_model_parallel()
    return held


def policy_and_reference(
    run: RunConfig, context: ParallelContext
) -> tuple[PolicyEngine, ReferenceModel | None]:
    """A rank's share of both, with the same random weights."""
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel, SharedReference

    architecture = architecture_of(run.model)
    policy = PolicyEngine(architecture, run, context)
    if run.reference is None:
        return policy, None
    if run.lora is not None:
        return policy, SharedReference(run.reference, context, policy.chunks, keeps_start=False)
    reference = ReferenceModel(architecture, run, run.reference, context)
    reference.copy_from(policy.chunks)
    return policy, reference


def packed(num_tokens: int, num_sequences: int, vocab_size: int, *, seed: int, prompt: int = 0) -> TokenBatch:
    """Random tokens in sequences of one length, all behind the first `prompt` tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (num_tokens + 1,), generator=generator)
    length = (num_tokens - prompt) // num_sequences
    assert prompt + length * num_sequences == num_tokens
    lengths = [prompt] * (prompt > 0) + [length] * num_sequences
    positions = [torch.arange(prompt), *[prompt + torch.arange(length)] * num_sequences]
    return TokenBatch(
        tokens=tokens[:-1],
        labels=tokens[1:],
        positions=torch.cat(positions),
        loss_mask=torch.ones(num_tokens, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        token_weight=torch.full((num_tokens,), 1.0 / num_tokens),
        prefixes=(None, *[Prefix(0, prompt)] * num_sequences) if prompt else (),
    )


def optimizer_tensors(policy: Any) -> Iterator[Tensor]:
    """What the optimizers own: fp32 weights in their groups, and their state."""
    from megatron_sftrl.engine.optimizer import leaves

    for leaf in leaves(policy.optimizer):
        for group in leaf.optimizer.param_groups:
            yield from group["params"]
        for state in leaf.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def policy_storages(policy: Any) -> Iterator[int]:
    """Where the model's own weights lie: an optimizer of fp32 weights works on them in place."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            yield parameter.untyped_storage().data_ptr()


def storage_bytes(tensors: Iterable[Tensor], within: list[int] | None = None) -> int:
    """Bytes of the distinct storages behind `tensors`; of those that start at `within` where given."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for start, size in storages.items() if within is None or start in within)


def allocated_peak(function: Any) -> int:
    """Most bytes that PyTorch's CPU allocator had given out during `function`, beyond those before it.

    Every allocation and release counts, those inside an operator too; not those inside a collective.
    """
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run,
        UncountedCollectives(),
    ):
        function()
    assert run.profiler is not None
    assert run.profiler.kineto_results is not None
    now = peak = collective_end = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == LABEL:
            collective_end = event.end_ns()
        elif event.name() == "[memory]" and event.start_ns() > collective_end:
            now += event.nbytes()
            peak = max(peak, now)
    return peak
