"""What every trainer does around its loop: begin or go on, follow the policy, and write numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import SharedProgress, on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.metrics import MetricsWriter, open_metrics
from megatron_sftrl.observability.run_directory import RunDirectory, open_run_directory
from megatron_sftrl.observability.run_lock import RunLock
from megatron_sftrl.observability.watch import HangWatch
from megatron_sftrl.trainers.origins import Origins


def begin_run(config: TrainingConfig, origins: Origins) -> None:
    """Write down whose run directory this is and which weights the run began with; rank 0 only.

    Raises:
        UserError, RuntimeError: the directory belongs to another run, or cannot be written.
    """
    open_run_directory(config, is_writer=False)
    try:
        origins.write()
    except OSError as error:
        raise error_of(f"cannot write into run_dir {config.run_dir}: {error}", error) from error
    # Last: an origins.json beside no resolved.yaml is of a run that never began.
    open_run_directory(config, is_writer=True)


def resume_or_start(
    store: CheckpointStore,
    policy: PolicyEngine,
    reference: ReferenceModel | None,
    *,
    fingerprint: str,
    columns: str,
) -> TrainerState:
    """Load the run's latest checkpoint into the models; step 0 where there is none.

    Args:
        store: of the run.
        policy, reference: at their initial weights.
        fingerprint: of the training data.
        columns: what it covers, for the message.
    Raises:
        UserError: the checkpoint was trained on other data.
    """
    latest = store.latest()
    if latest is None:
        return TrainerState(data_fingerprint=fingerprint)
    state = store.load(latest, policy, reference)
    if state.data_fingerprint != fingerprint:
        raise UserError(
            f"data.train is not what {latest} was trained on: its {columns} changed, so the run would go on "
            "with other samples; restore the data, or choose another run_dir"
        )
    return state


def shared_progress(config: TrainingConfig, parallel: ParallelContext, watch: HangWatch) -> SharedProgress:
    """What moves on any rank, told to every rank's watch, often enough for it; every rank calls this."""
    seconds = config.train.hang_minutes * 60
    return SharedProgress(parallel, watch.moved, seconds=min(1.0, seconds / 10) if seconds else 1.0)


def follow(policy: PolicyEngine, reference: ReferenceModel | None, *, steps_done: int) -> None:
    """Move a reference that follows the policy, where it is due."""
    if reference is not None and reference.is_due(steps_done):
        policy.gather_parameters()
        reference.follow(policy.chunks)


def save_numbers(store: CheckpointStore) -> dict[str, float]:
    """How fast the last checkpoint was written, in the numbers of the first step after its end.

    Raises:
        UserError, RuntimeError: on every rank, when it could not be written beside the training.
    """
    written = store.written()
    if written is None:
        return {}
    return {
        "checkpoint/write_seconds": written.seconds,
        "checkpoint/gigabytes_per_second": written.num_bytes / 1e9 / written.seconds,
    }


@contextlib.contextmanager
def hold(directory: RunDirectory) -> Iterator[None]:
    """Keep other runs out of the directory; rank 0 holds its lock for all.

    Raises:
        UserError, RuntimeError: on every rank: another run is in it, or rank 0 cannot write there.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(RunLock(directory.path))

        on_rank_zero(enter)
        yield


@contextlib.contextmanager
def metrics_on_rank_zero(
    directory: RunDirectory,
    config: TrainingConfig,
    parallel: ParallelContext,
    *,
    resume_step: int,
    total_steps: int,
) -> Iterator[MetricsWriter]:
    """Rank 0 writes; the others hand their numbers to nobody, and wait at the end.

    Raises:
        UserError, RuntimeError: on every rank, when rank 0 cannot open what it shall write to.
    """

    def open_sinks() -> MetricsWriter:
        if parallel.rank > 0:
            return MetricsWriter([])
        return open_metrics(directory, config, resume_step=resume_step, total_steps=total_steps)

    with on_every_rank(open_sinks) as metrics:
        yield metrics
    dist.barrier()
