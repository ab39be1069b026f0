"""A run on the disk and back: saved atomically, loaded into any layout, refused when it does not fit.

Not in a checkpoint: a frozen reference (made again from the configuration), gradients, the configuration
(run_dir has it), and the sampler's state (a function of seed and consumed_samples). Saving stops the training
until the files are on the disk or, asynchronously, until the state is copied in host memory.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_sftrl.engine.checkpoint import directory as checkpoint_directory
from megatron_sftrl.engine.checkpoint.background import BackgroundAction
from megatron_sftrl.engine.checkpoint.converted import store_assets
from megatron_sftrl.engine.checkpoint.directory import (
    CheckpointRecord,
    TrainerState,
    Verification,
    differences,
    hashed_files,
    verified_record,
)
from megatron_sftrl.engine.checkpoint.format import (
    check_tensors,
    num_bytes,
    read_tensors,
    stored_dtypes,
    stored_here,
    stored_shapes,
    write_tensors,
)
from megatron_sftrl.engine.checkpoint.tensors import (
    first_replicas,
    model_tensors,
    optimizer_shares,
    optimizer_step,
    optimizer_tensors,
    replicated_shares,
    restore_rng_states,
    rng_states,
    rng_tensors,
    send_to_replicas,
    set_optimizer_step,
    weights_of,
)
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import on_rank_zero, sum_over_ranks
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, from_record, to_record
from megatron_sftrl.models.hf_output import HfAssets

LOGGER = logging.getLogger(__name__)

# A run as the record of a checkpoint tells it, and whether a record is of this run.


# They change no parameter's shape and no number that the network computes from given weights.
_FREE_ARCHITECTURE_FIELDS = ("init_std", "max_position_embeddings")


def describe_run(
    state: TrainerState, policy: PolicyEngine, reference: ReferenceModel | None, step: int
) -> CheckpointRecord:
    """The record, without files, of a checkpoint of this run whose optimizer has applied `step` updates."""
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
        lora=policy.adapters_record(),
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
    problems += _adapter_differences(record, policy)
    _raise_if_different(problems, path)


def check_architecture(record: CheckpointRecord, architecture: Architecture, path: Path) -> None:
    """Refuse a checkpoint of a model of other sizes: UserError on every rank, naming each difference."""
    _raise_if_different(_architecture_differences(record, architecture), path)


def stored_reference(reference: ReferenceModel | None) -> str | None:
    """Kind of the reference in a checkpoint: a frozen one is made again, a moving average is state."""
    if reference is None or reference.section.kind == "frozen":
        return None
    return reference.section.kind


def layout_of(parallel: ParallelContext) -> dict[str, str | int]:
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

    # Read and written again, a record of an older version has today's fields.
    recorded = to_record(from_record(record.architecture))
    return differences(relevant(recorded), relevant(to_record(architecture)))


def _adapter_differences(record: CheckpointRecord, policy: PolicyEngine) -> list[str]:
    """Of the adapters and the weights under them, wherever those lie."""
    ours = policy.adapters_record()
    if record.lora is None or ours is None:
        return differences({"lora": record.lora}, {"lora": ours})
    stored, current = ({**each, "base_path": None} for each in (record.lora, ours))
    return [f"lora.{each}" for each in differences(stored, current)]


def _raise_if_different(problems: list[str], path: Path) -> None:
    if problems:
        raise UserError(
            f"checkpoint {path} belongs to another run; nothing was loaded:\n  " + "\n  ".join(problems)
        )


def _dtype(policy: PolicyEngine) -> str:
    return "bf16" if policy.config.params_dtype == torch.bfloat16 else "fp32"


# From tensors to a complete checkpoint directory, while the training waits or beside it.


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A complete checkpoint: its bytes, and the seconds from the first one until it had its name."""

    num_bytes: int
    seconds: float


def write_checkpoint(
    tensors: Sequence[ShardedTensor],
    record: CheckpointRecord,
    *,
    directory: Path,
    assets: HfAssets,
    keep_last: int,
    group: dist.ProcessGroup | None = None,
    on_progress: Callable[[], None] | None = None,
) -> Written:
    """Write a checkpoint of `record.trainer.step` and remove old ones; every rank calls it.

    Args:
        tensors: of this rank; nothing changes them meanwhile.
        record: without files.
        directory: of the run's checkpoints.
        keep_last: complete checkpoints that stay.
        on_progress: called for each tensor that is written and each file that is hashed.
    Raises:
        UserError, RuntimeError: on every rank, when it could not be written (a full disk is the user's);
            earlier checkpoints are as they were.
    """
    began, step = time.monotonic(), record.trainer.step
    total = sum_over_ranks(num_bytes(tensors), group)
    temporary = on_rank_zero(lambda: checkpoint_directory.begin(directory, step, num_bytes=total), group)
    try:
        write_tensors(tensors, temporary, group, on_progress)
        on_rank_zero(lambda: store_assets(temporary, assets), group)
        whole = dataclasses.replace(record, files=hashed_files(temporary, group, on_progress=on_progress))
        on_rank_zero(lambda: checkpoint_directory.complete(temporary, whole, keep_last=keep_last), group)
    except (UserError, RuntimeError) as error:  # on every rank, from together.py
        on_rank_zero(lambda: checkpoint_directory.discard(temporary), group)
        kind = UserError if isinstance(error, UserError) else RuntimeError
        raise kind(
            f"the checkpoint of step {step} could not be written to {directory}; earlier checkpoints are "
            f"untouched. {error}"
        ) from error
    written = Written(
        num_bytes=sum(file.size for file in whole.files.values()), seconds=time.monotonic() - began
    )
    path = directory / checkpoint_directory.step_name(step)
    LOGGER.info("saved step %d: %s, %.3g GB in %.3g s", step, path, written.num_bytes / 1e9, written.seconds)
    return written


# Copies of a checkpoint's tensors that training does not touch, in host memory that is used again.


class HostCopies:
    """Memory, pinned for CUDA, of one copy of what this rank stores; kept: new pages cost more than copying.

    torch's own stager (torch.distributed.checkpoint.staging, 2.13) copies the whole storage under a tensor:
    of a sharded optimizer's views, every rank would copy the buffers of all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, tensors: Iterable[ShardedTensor]) -> list[ShardedTensor]:
        """Those of the tensors that this rank stores, with data of their own; the call before loses its."""
        copies = []
        for tensor in stored_here(tensors):
            assert tensor.data is not None
            copy = self._place(tensor, tensor.data)
            copies.append(dataclasses.replace(tensor, data=copy.copy_(tensor.data, non_blocking=True)))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies

    def _place(self, tensor: ShardedTensor, data: Tensor) -> Tensor:
        """A storage for each tensor: torch's writer would copy once more what is a part of its storage."""
        key = (tensor.key, tensor.global_offset)
        found = self._memory.get(key)
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
            is_cuda = self._device.type == "cuda"
            found = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=is_cuda)
            self._memory[key] = found
        return found


_NO_ASSETS = HfAssets(files={})


class CheckpointStore:
    """The checkpoints of one run. Every method is called by every rank.

    As a context manager it waits at the end for a save under way; after an error only for this rank's part.

    Args:
        directory: `<run_dir>/checkpoints`, on a file system that all nodes share.
        keep_last: complete checkpoints kept, at least 1.
        assets: tokenizer and configuration files that an export needs beside the weights.
        async_save: write on a thread, from copies in host memory, while training goes on.
        on_progress: called for each tensor and file of a save that the training waits for.
    """

    def __init__(
        self,
        directory: Path,
        parallel: ParallelContext,
        *,
        keep_last: int,
        assets: HfAssets = _NO_ASSETS,
        async_save: bool = False,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        assert keep_last >= 1
        self.assets = assets
        self.directory = directory
        self.parallel = parallel
        self.keep_last = keep_last
        self._background = BackgroundAction[Written](parallel) if async_save else None
        self._copies = HostCopies(parallel.device)
        self._written: Written | None = None
        self._on_progress = None if async_save else on_progress

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step, as rank 0 sees it; None when there is none."""
        found = on_rank_zero(lambda: checkpoint_directory.complete_checkpoints(self.directory))
        return found[-1] if found else None

    def save(self, state: TrainerState, policy: PolicyEngine, reference: ReferenceModel | None) -> Path:
        """Write a checkpoint of `state.step`; a kill or error at any moment leaves earlier ones as they are.

        Args:
            policy: with an optimizer, between two steps.
            reference: stored when it is a moving average.
        Returns:
            The checkpoint's path, which an asynchronous save gives it later. One of this step that exists
                already is kept and returned.
        Raises:
            UserError, RuntimeError: on every rank, when it or, asynchronously, the one before could not be
                written; a UserError where starting again would meet it again (a full disk, say).
        """
        assert policy.optimizer is not None
        self.finish()
        path = self.directory / checkpoint_directory.step_name(state.step)
        if path in on_rank_zero(lambda: checkpoint_directory.complete_checkpoints(self.directory)):
            return path
        policy.gather_parameters()
        tensors = _resume_tensors(policy, reference)
        tensors += rng_tensors(rng_states(self.parallel), self.parallel)
        record = describe_run(state, policy, reference, _agreed_step(policy, self.parallel))
        if self._background is None:
            self._written = self._write(tensors, record)
        else:
            copies, group = self._copies.copy(tensors), self._background.group
            self._background.start(lambda: self._write(copies, record, group))
        return path

    def written(self) -> Written | None:
        """What the last save wrote, once, when complete; for every step boundary. Raises like save()."""
        if self._background is not None:
            self._written = self._background.take(wait=False) or self._written
        written, self._written = self._written, None
        return written

    def finish(self) -> None:
        """Wait until an asynchronous save is complete. Raises like save()."""
        if self._background is not None:
            self._written = self._background.take(wait=True) or self._written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        elif self._background is not None and (problem := self._background.abandon()) is not None:
            LOGGER.error(problem)

    def _write(
        self,
        tensors: Sequence[ShardedTensor],
        record: CheckpointRecord,
        group: dist.ProcessGroup | None = None,
    ) -> Written:
        return write_checkpoint(
            tensors,
            record,
            directory=self.directory,
            assets=self.assets,
            keep_last=self.keep_last,
            group=group,
            on_progress=self._on_progress,
        )

    def load(self, path: Path, policy: PolicyEngine, reference: ReferenceModel | None) -> TrainerState:
        """Bring policy, optimizer and moving-average reference to where the checkpoint was written.

        On the layout that wrote it the run then continues bit by bit, on GPUs with train.deterministic. On
        another one (tp, pp, vp, cp, dp, distributed optimizer or not) every weight and moment is the same
        number at its new place; the random generators, which nothing in training draws from, keep their own
        state.

        Args:
            path: a complete checkpoint, from latest().
            policy: with an optimizer, before its first step.
            reference: built as in the run that saved. A frozen one is not touched.
        Raises:
            UserError: on every rank and before anything is changed: a damaged checkpoint, another
                architecture, dtype, optimizer or reference, tensors that do not fit.
        """
        assert policy.optimizer is not None
        record = verified_record(path)
        check_record(record, policy, reference, path)
        stored = stored_shapes(path)
        tensors = _resume_tensors(policy, reference)
        check_tensors(tensors, {key: stored[key] for key in stored if not key.startswith("rng.")}, path)
        states = rng_states(self.parallel)
        mine = first_replicas(tensors)
        if record.layout == layout_of(self.parallel):
            mine += rng_tensors(states, self.parallel)
        read_tensors(mine, path)
        held = weights_of(policy.chunks, adapters=policy.lora is not None) + replicated_shares(
            optimizer_shares(policy.optimizer)
        )
        if reference is not None and stored_reference(reference) is not None:
            held += weights_of(reference.chunks, reference.averages(), adapters=reference.has_adapters)
        send_to_replicas(held, self.parallel)
        _tell_of_rounded_average(path, reference)
        if reference is not None:
            reference.round_average()
        set_optimizer_step(policy.optimizer, record.optimizer_step)
        restore_rng_states(states, self.parallel)
        return record.trainer


def find_checkpoint(path: Path) -> Verification:
    """The checkpoint that a user's path means, being verified; every rank calls it, and then its finish().

    Args:
        path: a checkpoint directory, or a run directory for its latest complete checkpoint.
    Raises:
        UserError: on every rank: nothing there.
    """
    return Verification(on_rank_zero(lambda: checkpoint_directory.checkpoint_at(path)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCheckpoint:
    """A complete checkpoint whose files all are what was written."""

    path: Path
    record: CheckpointRecord


def load_weights(
    chunks: Sequence[LanguageModel], path: Path, *, architecture: Architecture, parallel: ParallelContext
) -> FoundCheckpoint:
    """Fill model chunks with the policy weights of a checkpoint of any layout; cast where dtypes differ.

    An optimizer over bf16 weights keeps fp32 copies: build it after this call, or call its
    reload_model_params().

    Args:
        path: a step directory, or a run directory for its latest complete checkpoint.
    Raises:
        UserError: on every rank and before anything is changed: no or a damaged checkpoint, differing sizes
            (all of them), missing or unexpected tensors (all of them).
    """
    verification = find_checkpoint(path)
    found, record = verification.path, verification.finish()
    check_architecture(record, architecture, found)
    assert record.lora is None, "adapters have a base: trainers/adapters.py loads both"
    tensors = model_tensors(chunks, prefix="policy")
    stored = stored_shapes(found)
    check_tensors(tensors, {key: stored[key] for key in stored if key.startswith("policy.")}, found)
    read_tensors(first_replicas(tensors), found)
    send_to_replicas(weights_of(chunks), parallel)
    return FoundCheckpoint(path=found, record=record)


def _resume_tensors(policy: PolicyEngine, reference: ReferenceModel | None) -> list[ShardedTensor]:
    """Everything but the random generators."""
    assert policy.optimizer is not None
    tensors = model_tensors(policy.chunks, prefix="policy", adapters=policy.lora is not None)
    tensors += optimizer_tensors(policy.chunks, optimizer_shares(policy.optimizer))
    if reference is not None and stored_reference(reference) is not None:
        tensors += model_tensors(
            reference.chunks,
            prefix="reference",
            instead=reference.averages(),
            adapters=reference.has_adapters,
        )
    return tensors


def _tell_of_rounded_average(path: Path, reference: ReferenceModel | None) -> None:
    """One line on standard error where older versions stored a moving average in the model's dtype."""
    if reference is None or not reference.averages():
        return
    dtypes = {dtype for key, dtype in stored_dtypes(path).items() if key.startswith("reference.")}
    if dtypes != {torch.float32} and dist.get_rank() == 0:
        LOGGER.warning(
            "checkpoint %s holds the moving average in %s, as older versions kept it: small updates were "
            "rounded away until here. It goes on in fp32",
            path,
            " and ".join(sorted(map(str, dtypes))),
        )


def _agreed_step(policy: PolicyEngine, parallel: ParallelContext) -> int:
    """Adam's t; a rank that owns no element of any parameter does not know it."""
    assert policy.optimizer is not None
    steps = torch.tensor(optimizer_step(policy.optimizer), device=parallel.device)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return int(steps)
