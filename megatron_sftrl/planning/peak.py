"""The most that one step's forward and backward hold at once on a rank, beyond the model's state."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.planning.activations import Kernels, Microbatch, block_bytes, head_bytes
from megatron_sftrl.planning.grid import Grid
from megatron_sftrl.planning.model_state import element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPeak:
    """Bytes at the fullest moment of a step on one rank.

    Args:
        blocks: kept for the backward of all micro-batches in flight, and the block at work.
        logits: of policy and reference, their gradient, the loss's buffers; 0 before the last stage.
        reference_states: last hidden states of the reference, for every micro-batch of the step.
        reference_forward: the most that the reference's own forward holds, which is over by then.
    """

    blocks: int
    logits: int
    reference_states: int
    reference_forward: int

    @property
    def training(self) -> int:
        """While the policy runs."""
        return self.blocks + self.logits + self.reference_states


def microbatch_of(config: TrainingConfig, grid: Grid, kernels: Kernels) -> Microbatch:
    """The largest micro-batch that the batch section allows."""
    multiple = 2 * grid.cp if grid.cp > 1 else 1
    whole = config.batch.max_tokens or config.batch.micro_size * _round_up(config.max_length, multiple)
    tokens = _round_up(whole, multiple * grid.tp) // grid.cp
    return Microbatch(
        tokens=tokens,
        residual_tokens=tokens // grid.tp if grid.sequence_parallel else tokens,
        longest=config.max_length,
        element=element_bytes(config),
        kernels=kernels,
    )


def step_peak(
    architecture: Architecture,
    config: TrainingConfig,
    grid: Grid,
    batch: Microbatch,
    *,
    stage: int,
    num_microbatches: int,
) -> StepPeak:
    """What a stage's rank holds at the fullest moment.

    Args:
        architecture, config, grid: of the run.
        batch: the largest micro-batch.
        stage: pipeline stage.
        num_microbatches: of a rank in one step.
    """
    block = block_bytes(architecture, grid, batch)
    is_full, has_reference = config.train.recompute == "full", config.reference is not None
    per_chunk = architecture.num_layers // grid.num_chunks
    in_flight = chunks_in_flight(grid, stage=stage, num_microbatches=num_microbatches)
    kept = block.input if is_full else block.saved
    blocks = in_flight * per_chunk * kept
    # What the stages exchange is kept until its backward, and an output on its way.
    exchanged = (in_flight + 1) * block.input if grid.pp > 1 else 0
    # The block at work: recomputed, and the gradients in it.
    at_work = (block.saved if is_full else 0) + block.backward
    if stage < grid.pp - 1:
        return StepPeak(
            blocks=blocks + exchanged + at_work,
            logits=0,
            reference_states=0,
            reference_forward=(2 * block.input + block.forward) * has_reference,
        )
    head = head_bytes(architecture, grid, batch, config.loss.fused)
    num_models = 1 + has_reference
    # The graph of the micro-batch before is let go after this one's forward, and its logits with it.
    held = num_models * head.logits
    earlier = held if num_microbatches > 1 and not head.is_fused else 0
    at_head = max(earlier + head.forward, head.backward)
    states = num_microbatches * block.input * has_reference
    return StepPeak(
        blocks=blocks + exchanged + head.saved + max(0, at_work - at_head),
        logits=held + at_head,
        reference_states=states,
        reference_forward=(states + 2 * block.input + block.forward) * has_reference,
    )


def chunks_in_flight(grid: Grid, *, stage: int, num_microbatches: int) -> int:
    """Forwards of a chunk whose backward is still to come, at most (1F1B, interleaved where vp > 1)."""
    if grid.pp == 1:
        return 1
    behind = grid.pp - stage - 1
    warm_up = behind if grid.vp == 1 else 2 * behind + (grid.vp - 1) * grid.pp
    return min(num_microbatches * grid.vp, warm_up + 1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
