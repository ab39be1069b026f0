"""Everything about a run that can be wrong is found here, before a process group or a model exists."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_sftrl.architectures import architecture_of
from megatron_sftrl.architectures.architecture import Architecture
from megatron_sftrl.config.checks import check_run
from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.data.loader import BatchLayout
from megatron_sftrl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_sftrl.losses.registry import Loss, build_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A configuration that has passed its checks, and what was read to check it.

    Args:
        config: as the user gave it.
        architecture: sizes of the model.
        loss: the objective.
        tokenizer: text to ids.
    """

    config: RunConfig
    architecture: Architecture
    loss: Loss
    tokenizer: Tokenizer


def plan_run(config: RunConfig) -> RunPlan:
    """Check sections against each other, the model, the loss, the tokenizer and the number of processes.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    architecture = architecture_of(config.model)
    loss = build_loss(config.loss.name, config.loss.options, modules=config.loss.modules)
    check_run(config, architecture, int(os.environ.get("WORLD_SIZE", "1")), loss_needs=loss.needs)
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, architecture.vocab_size)
    return RunPlan(config=config, architecture=architecture, loss=loss, tokenizer=tokenizer)


def plan_model(config: RunConfig) -> tuple[Architecture, Tokenizer]:
    """What generation and scoring need: the model's sizes and its tokenizer, checked against the layout.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    architecture = architecture_of(config.model)
    needs = ("reference",) if config.reference is not None else ()
    check_run(config, architecture, int(os.environ.get("WORLD_SIZE", "1")), loss_needs=needs)
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, architecture.vocab_size)
    return architecture, tokenizer


def batch_layout(config: RunConfig, *, dp_rank: int, dp_size: int) -> BatchLayout:
    """What the parallel section asks of every micro-batch."""
    parallel = config.parallel
    return BatchLayout(
        dp_rank=dp_rank,
        dp_size=dp_size,
        sequence_multiple_of=2 * parallel.cp if parallel.cp > 1 else 1,
        # Sequence parallelism splits the context-parallel share of T over tp.
        pad_to_multiple_of=parallel.tp * parallel.cp if parallel.sequence_parallel else 1,
        microbatch_multiple=parallel.pp if parallel.vp > 1 else 1,
        # Pipeline stages exchange tensors of one size.
        uniform_length=parallel.pp > 1,
    )
