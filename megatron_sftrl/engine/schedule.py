"""Micro-batches through Megatron's pipeline schedules: the only caller of get_forward_backward_func."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_sftrl.engine.context_parallel import shard_for_context_parallel
from megatron_sftrl.engine.kv_cache import CacheSlots
from megatron_sftrl.engine.model import LanguageModel, model_inputs
from megatron_sftrl.engine.packed_sequences import PackedSequences
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.types import TokenBatch

LastStage = Callable[["LastStageInput"], tuple[Tensor, Tensor, Any]]
"""From the last stage's hidden states to Megatron's (loss, num_tokens, report)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastStageInput:
    """What the last pipeline stage knows of one micro-batch.

    Args:
        index: of the micro-batch in this rank's step.
        batch: this rank's context-parallel share.
        lengths: of the whole sequences.
        weighted: [K] int64 rows of `batch` whose token_weight is not 0, in order.
        hidden_states: [T, 1, H] after the final norm; [T/tp, 1, H] under sequence parallelism.
    """

    index: int
    batch: TokenBatch
    lengths: tuple[int, ...]
    weighted: Tensor
    hidden_states: Tensor
    model: LanguageModel


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[TokenBatch],
    last_stage: LastStage,
    parallel: ParallelContext,
    *,
    forward_only: bool,
    places: Sequence[CacheSlots] = (),
    on_microbatch: Callable[[], None] | None = None,
) -> list[Any]:
    """Run every micro-batch through this rank's stage.

    Args:
        chunks: wrapped by DDP or not.
        batches: whole micro-batches (before the context-parallel split), on the CPU; all of one length when
            pp > 1, since the stages exchange tensors of a fixed size.
        last_stage: called on the last stage only, once a micro-batch.
        forward_only: no backward and no gradient synchronisation.
        places: of each micro-batch's tokens in a cache of keys and values; none without a cache.
        on_microbatch: called on every stage when a micro-batch begins.
    Returns:
        The third values that last_stage returned, in order; empty on other stages.
    """
    sizes = {batch.num_tokens for batch in batches}
    assert parallel.pp_size == 1 or len(sizes) == 1, "pipeline stages exchange tensors of one size"
    config: Any = get_attr_wrapped_model(chunks[0], "config")
    counts_tokens = config.moe_aux_loss_coeff or config.moe_router_bias_update_rate
    marks_padding = bool(counts_tokens) and not forward_only
    microbatches = [_microbatch(batch, parallel) for batch in batches]

    def forward_step(iterator: Iterator[tuple[int, _Microbatch]], chunk: torch.nn.Module) -> tuple:
        index, microbatch = next(iterator)
        if on_microbatch is not None:
            on_microbatch()
        cached = None
        if places:
            cached = places[index].map(lambda value: value.to(parallel.device, non_blocking=True))
        experts = microbatch.experts
        if experts is not None:
            experts = experts.to(parallel.device, non_blocking=True)
        packed = PackedSequences.of(
            microbatch.lengths,
            device=parallel.device,
            places=cached,
            experts=experts,
            prefixes=microbatch.batch.prefixes,
        )
        output = chunk(**model_inputs(microbatch.batch, packed, marks_padding=marks_padding))

        def finish(hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor, Any]:
            model = get_attr_wrapped_model(chunk, "logits", return_model_obj=True)
            assert isinstance(model, LanguageModel)
            return last_stage(
                LastStageInput(
                    index=index,
                    batch=microbatch.batch,
                    lengths=microbatch.lengths,
                    weighted=microbatch.weighted,
                    hidden_states=hidden_states,
                    model=model,
                )
            )

        return output, finish

    forward_backward = get_forward_backward_func()
    # Each chunk of a virtual pipeline walks over the same micro-batches on its own.
    iterators: list[Iterator] = [enumerate(microbatches) for _ in chunks]
    return forward_backward(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=max(sizes),
        micro_batch_size=1,
        forward_only=forward_only,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Microbatch:
    """A micro-batch on its device, and what was asked of it before: see LastStageInput.

    `experts` wait on the CPU: those of a whole step may be as large as its activations.
    """

    batch: TokenBatch
    lengths: tuple[int, ...]
    weighted: Tensor
    experts: Tensor | None


def _microbatch(whole: TokenBatch, parallel: ParallelContext) -> _Microbatch:
    share = shard_for_context_parallel(whole, cp_rank=parallel.cp_rank, cp_size=parallel.cp_size)
    weighted = (share.token_weight > 0).nonzero().squeeze(1)
    # Copies from memory that is not pinned have been read when the call returns.
    return _Microbatch(
        batch=replace(share, experts=None).to(parallel.device, non_blocking=True),
        lengths=whole.lengths(),
        weighted=weighted.to(parallel.device, non_blocking=True),
        experts=share.experts,
    )


# The one place where Megatron's own multiplications and divisions of the loss are cancelled.
#
# A TokenBatch's token_weight already sums to 1 over the step and all ranks, so gradients must simply be
# added up. Megatron would otherwise
#   - multiply a loss by cp and divide it by the number of micro-batches (schedules, 2-tuple losses);
#   - divide it by num_tokens (schedules, 3-tuple losses without calculate_per_token_loss);
#   - average gradients over dp x cp, those of experts too (DDP without calculate_per_token_loss);
#   - divide gradients by the all-reduced num_tokens (finalize_model_grads);
#   - multiply a router's load-balancing loss by the rank's tokens (engine/mixtures.py, BalancedRouter).
# calculate_per_token_loss=True (engine/megatron_config.py) with a 3-tuple loss switches the first three off;
# the functions here take care of the tuple and of the division.


def as_megatron_loss(loss: Tensor, report: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, num_tokens, report): the form of a loss that the schedule leaves as it is.

    The schedule adds num_tokens up; finalize_gradients ignores the sum, so 0 says that it means nothing.
    """
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), report


def finalize_gradients(model_chunks: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's finalize_model_grads (sums over dp x cp, tied embeddings, norms) without its division."""
    finalize_model_grads(model_chunks, None, **kwargs)  # type: ignore[arg-type]
