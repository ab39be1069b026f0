"""A run on the disk and back: saved atomically, loaded into any layout, refused when it does not fit.

What a checkpoint holds is told in tensors.py and record.py. Not in it: a frozen
reference (it is made again from the configuration), gradients, the configuration itself (run_dir has
it), and the sampler's state (a function of seed and consumed_samples).

Saving stops the training until the files are on the disk. Everything that a later asynchronous save
needs is apart already: the list of tensors, their writing, and the renaming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_sftrl.architectures.architecture import Architecture, to_record
from megatron_sftrl.engine.checkpoint import directory as checkpoint_directory
from megatron_sftrl.engine.checkpoint.converted import store_assets
from megatron_sftrl.engine.checkpoint.integrity import Verification, hashed_files, verified_record
from megatron_sftrl.engine.checkpoint.io import (
    check_tensors,
    num_bytes,
    read_tensors,
    stored_shapes,
    write_tensors,
)
from megatron_sftrl.engine.checkpoint.optimizer import optimizer_shares, optimizer_step, set_optimizer_step
from megatron_sftrl.engine.checkpoint.record import CheckpointRecord, TrainerState, differences
from megatron_sftrl.engine.checkpoint.tensors import (
    model_tensors,
    optimizer_tensors,
    restore_rng_states,
    rng_states,
    rng_tensors,
)
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.hf.assets import HfAssets

# They change no parameter's shape and no number that the network computes from given weights.
_FREE_ARCHITECTURE_FIELDS = ("init_std", "max_position_embeddings")
_NO_ASSETS = HfAssets(files={})


class CheckpointStore:
    """The checkpoints of one run. Every method is called by every rank.

    Args:
        directory: `<run_dir>/checkpoints`, on a file system that all nodes share.
        parallel: this rank's place.
        keep_last: complete checkpoints kept, at least 1.
        assets: tokenizer and configuration files that an export needs beside the weights.
    """

    def __init__(
        self, directory: Path, parallel: ParallelContext, *, keep_last: int, assets: HfAssets = _NO_ASSETS
    ) -> None:
        assert keep_last >= 1
        self.assets = assets
        self.directory = directory
        self.parallel = parallel
        self.keep_last = keep_last

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step, as rank 0 sees it; None when there is none."""
        found = on_rank_zero(lambda: checkpoint_directory.complete_checkpoints(self.directory))
        return found[-1] if found else None

    def save(self, state: TrainerState, policy: PolicyEngine, reference: ReferenceModel | None) -> Path:
        """Write a checkpoint of `state.step`; a kill or error at any moment leaves earlier ones as they are.

        Args:
            state: where the run stands.
            policy: with an optimizer, between two steps.
            reference: stored when it is a moving average.
        Returns:
            The checkpoint's path. One of this step that exists already is kept and returned.
        Raises:
            ValueError: on every rank, when it could not be written (a full disk, say).
        """
        assert policy.optimizer is not None
        for path in on_rank_zero(lambda: checkpoint_directory.complete_checkpoints(self.directory)):
            if path.name == checkpoint_directory.step_name(state.step):
                return path
        policy.gather_parameters()
        tensors = _resume_tensors(policy, reference)
        tensors += rng_tensors(rng_states(self.parallel), self.parallel)
        record = _record(state, policy, reference, _agreed_step(policy, self.parallel))
        total = _sum_over_ranks(num_bytes(tensors), self.parallel)
        temporary = on_rank_zero(
            lambda: checkpoint_directory.begin(self.directory, state.step, num_bytes=total)
        )
        try:
            write_tensors(tensors, temporary)
            on_rank_zero(lambda: store_assets(temporary, self.assets))
            record = dataclasses.replace(record, files=hashed_files(temporary))
            return on_rank_zero(
                lambda: checkpoint_directory.complete(temporary, record, keep_last=self.keep_last)
            )
        except ValueError as error:
            on_rank_zero(lambda: checkpoint_directory.discard(temporary))
            raise ValueError(
                f"the checkpoint of step {state.step} could not be written to {self.directory}; earlier "
                f"checkpoints are untouched. {error}"
            ) from error

    def load(self, path: Path, policy: PolicyEngine, reference: ReferenceModel | None) -> TrainerState:
        """Bring policy, optimizer and moving-average reference to where the checkpoint was written.

        On the layout that wrote it the run then continues bit by bit. On another one (tp, pp, vp, cp, dp,
        distributed optimizer or not) every weight and moment is the same number at its new place; the
        random generators, which nothing in training draws from, keep their own state.

        Args:
            path: a complete checkpoint, from latest().
            policy: with an optimizer, before its first step.
            reference: built as in the run that saved. A frozen one is not touched.
        Raises:
            ValueError: on every rank and before anything is changed: a damaged checkpoint, another
                architecture, dtype, optimizer or reference, tensors that do not fit.
        """
        assert policy.optimizer is not None
        record = verified_record(path)
        _check_record(record, policy, reference, path)
        stored = stored_shapes(path)
        tensors = _resume_tensors(policy, reference)
        check_tensors(tensors, {key: stored[key] for key in stored if not key.startswith("rng.")}, path)
        states = rng_states(self.parallel)
        if record.layout == _layout(self.parallel):
            tensors += rng_tensors(states, self.parallel)
        read_tensors(tensors, path)
        set_optimizer_step(policy.optimizer, record.optimizer_step)
        restore_rng_states(states, self.parallel)
        return record.trainer


def find_checkpoint(path: Path) -> Verification:
    """The checkpoint that a user's path means, being verified; every rank calls it, and then its finish().

    Args:
        path: a checkpoint directory, or a run directory for its latest complete checkpoint.
    Raises:
        ValueError: on every rank: nothing there.
    """
    return Verification(on_rank_zero(lambda: checkpoint_directory.checkpoint_at(path)))


def load_weights(chunks: Sequence[LanguageModel], path: Path, *, architecture: Architecture) -> None:
    """Fill model chunks with the policy weights of a checkpoint of any layout; cast where dtypes differ.

    An optimizer over bf16 weights keeps fp32 copies: build it after this call, or call its
    reload_model_params().

    Args:
        chunks: this rank's chunks, without DDP.
        path: a step directory, or a run directory for its latest complete checkpoint.
        architecture: of the chunks.
    Raises:
        ValueError: on every rank and before anything is changed: no or a damaged checkpoint, differing
            sizes (all of them), missing or unexpected tensors (all of them).
    """
    verification = find_checkpoint(path)
    found, record = verification.path, verification.finish()
    _raise_if_different(_architecture_differences(record, architecture), found)
    tensors = model_tensors(chunks, prefix="policy")
    stored = stored_shapes(found)
    check_tensors(tensors, {key: stored[key] for key in stored if key.startswith("policy.")}, found)
    read_tensors(tensors, found)


def _resume_tensors(policy: PolicyEngine, reference: ReferenceModel | None) -> list[ShardedTensor]:
    """Everything but the random generators."""
    assert policy.optimizer is not None
    tensors = model_tensors(policy.chunks, prefix="policy")
    tensors += optimizer_tensors(policy.chunks, optimizer_shares(policy.optimizer))
    if reference is not None and _stored_kind(reference) is not None:
        tensors += model_tensors(reference.chunks, prefix="reference")
    return tensors


def _record(
    state: TrainerState, policy: PolicyEngine, reference: ReferenceModel | None, step: int
) -> CheckpointRecord:
    return CheckpointRecord(
        trainer=state,
        architecture=to_record(policy.architecture),
        dtype=_dtype(policy),
        optimizer=policy.optim.name,
        optimizer_step=step,
        reference=_stored_kind(reference),
        layout=_layout(policy.parallel),
        versions={"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        files={},
    )


def _check_record(
    record: CheckpointRecord, policy: PolicyEngine, reference: ReferenceModel | None, path: Path
) -> None:
    """Every rank has the same record, so every rank raises the same error."""
    problems = _architecture_differences(record, policy.architecture)
    problems += differences(
        {"model.dtype": record.dtype, "optim.name": record.optimizer, "moving reference": record.reference},
        {
            "model.dtype": _dtype(policy),
            "optim.name": policy.optim.name,
            "moving reference": _stored_kind(reference),
        },
    )
    _raise_if_different(problems, path)


def _architecture_differences(record: CheckpointRecord, architecture: Architecture) -> list[str]:
    def relevant(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in _FREE_ARCHITECTURE_FIELDS}

    return differences(relevant(record.architecture), relevant(to_record(architecture)))


def _raise_if_different(problems: list[str], path: Path) -> None:
    if problems:
        raise ValueError(
            f"checkpoint {path} belongs to another run; nothing was loaded:\n  " + "\n  ".join(problems)
        )


def _stored_kind(reference: ReferenceModel | None) -> str | None:
    """A frozen reference is made again from the configuration, a moving average is state."""
    if reference is None or reference.section.kind == "frozen":
        return None
    return reference.section.kind


def _dtype(policy: PolicyEngine) -> str:
    return "bf16" if policy.config.params_dtype == torch.bfloat16 else "fp32"


def _layout(parallel: ParallelContext) -> dict[str, str | int]:
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


def _agreed_step(policy: PolicyEngine, parallel: ParallelContext) -> int:
    """Adam's t; a rank that owns no element of any parameter does not know it."""
    assert policy.optimizer is not None
    steps = torch.tensor(optimizer_step(policy.optimizer), device=parallel.device)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return int(steps)


def _sum_over_ranks(value: int, parallel: ParallelContext) -> int:
    total = torch.tensor(value, device=parallel.device)
    dist.all_reduce(total)
    return int(total)
