"""A run as the record of a checkpoint tells it, and whether a record is of this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron.core
import torch

from megatron_sftrl.engine.checkpoint.record import CheckpointRecord, TrainerState, differences
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, to_record

# They change no parameter's shape and no number that the network computes from given weights.
_FREE_ARCHITECTURE_FIELDS = ("init_std", "max_position_embeddings")


def describe_run(
    state: TrainerState, policy: PolicyEngine, reference: ReferenceModel | None, step: int
) -> CheckpointRecord:
    """The record of a checkpoint of this run that has no files yet.

    Args:
        state: where the run stands.
        policy, reference: of the run.
        step: updates that the optimizer has applied.
    """
    return CheckpointRecord(
        trainer=state,
        architecture=to_record(policy.architecture),
        dtype=_dtype(policy),
        optimizer=policy.optim.name,
        optimizer_step=step,
        reference=stored_reference(reference),
        layout=layout_of(policy.parallel),
        versions={"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        files={},
    )


def check_record(
    record: CheckpointRecord, policy: PolicyEngine, reference: ReferenceModel | None, path: Path
) -> None:
    """Refuse a checkpoint whose state is not that of this run; every rank has the same record.

    Raises:
        UserError: on every rank, naming each difference.
    """
    problems = _architecture_differences(record, policy.architecture)
    problems += differences(
        {"model.dtype": record.dtype, "optim.name": record.optimizer, "moving reference": record.reference},
        {
            "model.dtype": _dtype(policy),
            "optim.name": policy.optim.name,
            "moving reference": stored_reference(reference),
        },
    )
    _raise_if_different(problems, path)


def check_architecture(record: CheckpointRecord, architecture: Architecture, path: Path) -> None:
    """Refuse a checkpoint of a model of other sizes.

    Raises:
        UserError: on every rank, naming each difference.
    """
    _raise_if_different(_architecture_differences(record, architecture), path)


def stored_reference(reference: ReferenceModel | None) -> str | None:
    """Kind of the reference in a checkpoint: a frozen one is made again, a moving average is state."""
    if reference is None or reference.section.kind == "frozen":
        return None
    return reference.section.kind


def layout_of(parallel: ParallelContext) -> dict[str, str | int]:
    """Sizes of the parallel axes and the kind of device."""
    return {
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "vp": parallel.vp_size,
        "cp": parallel.cp_size,
        "ep": parallel.ep_size,
        "etp": parallel.etp_size,
        "dp": parallel.dp_size,
        "device": parallel.device.type,
    }


def _architecture_differences(record: CheckpointRecord, architecture: Architecture) -> list[str]:
    def relevant(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in _FREE_ARCHITECTURE_FIELDS}

    return differences(relevant(record.architecture), relevant(to_record(architecture)))


def _raise_if_different(problems: list[str], path: Path) -> None:
    if problems:
        raise UserError(
            f"checkpoint {path} belongs to another run; nothing was loaded:\n  " + "\n  ".join(problems)
        )


def _dtype(policy: PolicyEngine) -> str:
    return "bf16" if policy.config.params_dtype == torch.bfloat16 else "fp32"
