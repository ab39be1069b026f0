"""What no single section can know: whether the settings of a run fit together, the model and the machine.

Pure functions of values: nothing is built, no file is read, no process group is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.config.settings_in_use import idle_settings


class ModelSizes(Protocol):
    """The part of an Architecture that layouts and lengths are held against."""

    @property
    def num_layers(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


def check_run(
    config: RunConfig, architecture: ModelSizes, world_size: int, *, loss_needs: tuple[str, ...]
) -> None:
    """Hold the sections against each other, the architecture and the number of processes.

    batch.global_size need not divide by dp * micro_size: a rank without sequences runs an empty
    micro-batch, and token_weight keeps every loss token's share.

    Args:
        config: the run.
        architecture: sizes of the model.
        world_size: processes in all.
        loss_needs: what the loss declared, for example ("reference",).
    Raises:
        ValueError: everything that does not fit, one line each.
    """
    problems = [
        *_world_problems(config, world_size),
        *_layout_problems(config, architecture),
        *_optimizer_problems(config),
        *_length_problems(config, architecture),
        *_reference_problems(config, loss_needs),
        *_schedule_problems(config),
        *_idle_problems(config),
    ]
    if problems:
        raise ValueError("\n  ".join([f"the run cannot start, {len(problems)} problem(s)", *problems]))


def _world_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    replica = parallel.tp * parallel.pp * parallel.cp
    if world_size % replica:
        fits = world_size // replica * replica
        counts = f"{fits} (dp = {fits // replica})" if fits else ""
        more = f"{fits + replica} (dp = {fits // replica + 1})"
        yield (
            f"{world_size} process(es) are not a multiple of parallel.tp * pp * cp = "
            f"{parallel.tp} * {parallel.pp} * {parallel.cp} = {replica}: "
            f"start {' or '.join(filter(None, (counts, more)))} processes, or change the sizes"
        )


def _layout_problems(config: RunConfig, architecture: ModelSizes) -> Iterator[str]:
    parallel = config.parallel
    stages = parallel.pp * parallel.vp
    if architecture.num_layers % stages:
        yield (
            f"the model's {architecture.num_layers} layers do not divide by parallel.pp * vp = "
            f"{parallel.pp} * {parallel.vp} = {stages}: choose pp * vp among the divisors of "
            f"{architecture.num_layers}"
        )
    for what, count in (
        ("attention heads", architecture.num_attention_heads),
        ("query groups (key/value heads)", architecture.num_query_groups),
        ("MLP columns (ffn_hidden_size)", architecture.ffn_hidden_size),
    ):
        if count % parallel.tp:
            yield (
                f"the model's {count} {what} do not divide by parallel.tp = {parallel.tp}: "
                f"choose tp among the divisors of {count}"
            )
    if parallel.vp > 1 and parallel.pp == 1:
        yield f"parallel.vp = {parallel.vp} needs parallel.pp > 1: set pp, or vp = 1"
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel needs parallel.tp > 1: set tp, or sequence_parallel = false"


def _optimizer_problems(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not (
        parallel.distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather needs parallel.distributed_optimizer = true and "
            "parallel.overlap_grad_reduce = true: set both, or overlap_param_gather = false"
        )
    if parallel.distributed_optimizer and config.optim.name == "sgd":
        yield (
            "parallel.distributed_optimizer shards Adam's state only (megatron-core): set "
            "distributed_optimizer = false, or optim.name = adamw"
        )


def _length_problems(config: RunConfig, architecture: ModelSizes) -> Iterator[str]:
    max_length, max_tokens = config.data.max_length, config.batch.max_tokens
    if max_tokens is not None and max_tokens < max_length:
        yield (
            f"batch.max_tokens = {max_tokens} is less than data.max_length = {max_length}: the longest "
            "sequence would fit into no micro-batch; raise max_tokens or lower max_length"
        )
    if max_length > architecture.max_position_embeddings:
        yield (
            f"data.max_length = {max_length} is more than the model's max_position_embeddings = "
            f"{architecture.max_position_embeddings}: lower max_length"
        )


def _reference_problems(config: RunConfig, loss_needs: tuple[str, ...]) -> Iterator[str]:
    is_needed = "reference" in loss_needs
    if is_needed and config.reference is None:
        yield (
            f"loss '{config.loss.name}' needs a reference model: add `reference: {{kind: frozen}}` (the "
            "weights that training starts from) or `reference: {kind: moving_average}` (follows the "
            "policy), or reference.kind=... on the command line"
        )
    if config.reference is not None and not is_needed:
        yield (
            f"loss '{config.loss.name}' uses no reference model: remove the section `reference`, or "
            "reference=null on the command line"
        )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    steps = config.train.steps
    if steps is not None and config.optim.warmup_steps > steps:
        yield (
            f"optim.warmup_steps = {config.optim.warmup_steps} is more than train.steps = {steps}: "
            "the peak learning rate would never be reached; lower warmup_steps"
        )


def _idle_problems(config: RunConfig) -> Iterator[str]:
    for setting in idle_settings(config):
        if setting.is_written:
            yield (
                f"{setting.key} has no effect: {setting.reason}; remove it, or {setting.key}=null on the "
                "command line"
            )
