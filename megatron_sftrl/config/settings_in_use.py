"""Which settings have no effect beside the others: writing one of them down is a user's mistake."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sftrl.config.grpo import GrpoConfig
from megatron_sftrl.config.schema import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleSetting:
    """A key that does nothing in this run.

    Args:
        key: full dotted path.
        reason: the setting that makes it idle.
        is_written: the user gave it a value, so it is not merely the default.
    """

    key: str
    reason: str
    is_written: bool


def idle_settings(config: TrainingConfig) -> list[IdleSetting]:
    """Every key that the rest of `config` leaves without effect, written or not."""
    idle: list[IdleSetting] = []

    def add(section: str, names: tuple[str, ...], reason: str) -> None:
        written = getattr(config, section).model_fields_set
        for name in names:
            idle.append(IdleSetting(key=f"{section}.{name}", reason=reason, is_written=name in written))

    if config.reference is not None and config.reference.kind == "frozen":
        add("reference", ("decay", "sync_every"), "reference.kind is frozen")
    if config.reference is not None and config.reference.kind == "moving_average":
        add("reference", ("checkpoint",), "a moving average starts from the policy (reference.kind)")
    if config.optim.name == "sgd":
        add("optim", ("betas", "eps"), "optim.name is sgd")
    else:
        add("optim", ("momentum",), "optim.name is adamw")
    if config.optim.schedule == "constant":
        add("optim", ("min_lr_ratio", "schedule_steps"), "optim.schedule is constant")
    if config.batch.packing:
        add("batch", ("micro_size",), "batch.packing fills micro-batches by tokens (batch.max_tokens)")
    if isinstance(config, GrpoConfig):
        if config.rollout.engine == "vllm":
            add("rollout", ("max_concurrent",), "rollout.engine is vllm (rollout.vllm.max_num_seqs)")
        else:
            add("rollout", ("vllm",), "rollout.engine is in_process")
        if not config.filters.dynamic_sampling:
            add("filters", ("max_rounds",), "filters.dynamic_sampling is off")
    if config.model.hf is None:
        add("model", ("allow_pickle",), "model.hf is not given")
    if not config.has_validation:
        add("train", ("eval_every",), "data.valid is empty")
    return idle
