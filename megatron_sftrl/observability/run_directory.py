"""A run's directory: its resolved configuration, and the refusal to continue in another run's directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.config.load import config_from_text, parse_yaml, resolved_yaml
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.errors import UserError, error_of, first_of

# A resumed run may change these: none of them changes which numbers training computes, beyond the order
# of fp32 sums (layouts, micro-batches) or where the run ends. train.steps and train.epochs join them only
# under a constant schedule: cosine and linear stretch with the length.
_FREE_TO_CHANGE = (
    "run_dir",
    "parallel",
    "checkpoint",
    "log",
    "gates",
    "data.valid",
    "batch.micro_size",
    "batch.packing",
    "batch.max_tokens",
    "loss.fused",
    "loss.chunk_mb",
    "reference.placement",
    "train.recompute",
    "train.recompute_layers",
    "train.recompute_modules",
    "train.eval_every",
    "train.max_nonfinite_steps",
    "train.hang_minutes",
    "rollout.offload",
    "rollout.devices",
    "rollout.tp",
    "rollout.max_concurrent",
    "rollout.save_samples",
    "reward_workers.num_workers",
)
_NEVER_FREE = ("parallel.grad_reduce_dtype", "parallel.megatron")
"""Inside of sections that are free otherwise: bf16 sums round after each micro-batch, and Megatron's own
fields include the dtype of the router and the layers that stay in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """The places inside a run's directory."""

    path: Path

    @property
    def resolved(self) -> Path:
        """The configuration with every default written out."""
        return self.path / "resolved.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def tracker_id(self, tracker: str) -> Path:
        """The file with the id under which a tracker (wandb, trackio, mlflow) continues this run."""
        return self.path / f"{tracker}_id"


def open_run_directory(config: TrainingConfig, *, is_writer: bool) -> RunDirectory:
    """The run's directory, once it is certain that it belongs to this run.

    Every rank may call it: all of them compare, only the writer (rank 0) makes the directory and
    resolved.yaml, which the others accept whether they look before or after.

    Raises:
        UserError: the directory belongs to another configuration (each differing key is named), or holds a
            run without its configuration, or cannot be created.
    """
    directory = RunDirectory(path=config.run_dir)
    if directory.path.exists() and not directory.path.is_dir():
        raise UserError(f"run_dir {directory.path} is a file: choose a directory")
    if directory.resolved.exists():
        _refuse_another_run(directory, config)
    elif directory.metrics.exists() or directory.checkpoints.exists():
        raise UserError(
            f"run_dir {directory.path} holds metrics or checkpoints but no resolved.yaml, so it cannot be "
            "told whose they are: choose another run_dir, or move them away"
        )
    if is_writer:
        try:
            directory.path.mkdir(parents=True, exist_ok=True)
            write_atomically(directory.resolved, resolved_yaml(config))
        except OSError as error:
            raise error_of(f"cannot write into run_dir {directory.path}: {error}", error) from error
    return directory


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _refuse_another_run(directory: RunDirectory, config: TrainingConfig) -> None:
    source = str(directory.resolved)
    old = config_from_text(directory.resolved.read_text(encoding="utf-8"), source=source, schema=type(config))
    free = _FREE_TO_CHANGE
    if old.optim.schedule == config.optim.schedule == "constant":
        free = (*free, "train.steps", "train.epochs")
    before, now = flat(resolved_yaml(old)), flat(resolved_yaml(config))
    differing = [
        key
        for key in [*before, *(key for key in now if key not in before)]
        if before.get(key) != now.get(key) and (_is_in(key, _NEVER_FREE) or not _is_in(key, free))
    ]
    if differing:
        rows = [f"{key}: {_text(before, key)} there, {_text(now, key)} now" for key in differing]
        raise UserError(
            "\n  ".join(
                [
                    f"run_dir {directory.path} belongs to a run with another configuration: choose another "
                    "run_dir, or set these back",
                    *first_of(rows, 12),
                ]
            )
        )


def _is_in(key: str, sections: tuple[str, ...]) -> bool:
    """Whether the key is one of these, or inside of one."""
    return any(f"{key}.".startswith(f"{name}.") for name in sections)


def flat(text: str) -> dict[str, Any]:
    """The values of a YAML text by their dotted keys; a list is a value."""
    values: dict[str, Any] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, key))
        else:
            values[".".join(path)] = value

    walk(parse_yaml(text, source="resolved.yaml").value, ())
    return values


def _text(flat: dict[str, Any], key: str) -> str:
    return "not given" if flat.get(key) is None else str(flat[key])
