"""What every trainer does around its loop: begin or go on, follow the policy, and write numbers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState, load_weights
from megatron_sftrl.engine.live_weights import load_hf_weights
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import SharedProgress, on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.observability.metrics import MetricsWriter, open_metrics
from megatron_sftrl.observability.run_directory import RunDirectory, open_run_directory
from megatron_sftrl.observability.run_lock import RunLock
from megatron_sftrl.observability.watch import HangWatch, Place, StragglerWatch
from megatron_sftrl.trainers.checked import ConfigT, RunPlan
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


# The models of a run, with the weights that it starts from.


def build_models(
    plan: RunPlan[ConfigT], parallel: ParallelContext, origins: Origins, *, is_resumed: bool
) -> tuple[PolicyEngine, ReferenceModel | None]:
    """The policy at its initial weights, and its reference where the run has one.

    A frozen reference is the policy before its first step (or reference.checkpoint); it is derived again
    at every start, before a checkpoint moves the policy on, and so needs no place in a checkpoint.

    Args:
        plan: of the run.
        parallel: this rank's place.
        origins: what the run began with.
        is_resumed: a checkpoint of the run follows. Initial weights that nothing is derived from are then
            not read: they may be gone.
    Raises:
        UserError: on every rank: weights that cannot be read, or are not those that the run began with.
    """
    config = plan.config
    policy = PolicyEngine(plan.architecture, config, parallel)
    section = config.reference
    is_derived = section is not None and section.kind == "frozen" and section.checkpoint is None
    if is_derived or not is_resumed:
        _load_start(plan, policy, origins)
    if config.reference is None:
        return policy, None
    reference = ReferenceModel(plan.architecture, config, config.reference, parallel)
    if config.reference.checkpoint is not None:
        _load_checkpoint(
            "reference.checkpoint", config.reference.checkpoint, reference.chunks, plan.architecture, origins
        )
    else:
        reference.copy_from(policy.chunks)
    return policy, reference


def _load_start(plan: RunPlan[ConfigT], policy: PolicyEngine, origins: Origins) -> None:
    """Initial weights from files, where the run names any."""
    model = plan.config.model
    if model.hf is not None:
        with open_weights(model.hf, allow_pickle=model.allow_pickle) as weights:
            on_every_rank(lambda: load_hf_weights(policy.chunks, weights, plan.architecture))
            origins.take_hf("model.hf", model.hf, weights)
    if model.init_checkpoint is not None:
        key = "model.init_checkpoint"
        _load_checkpoint(key, model.init_checkpoint, policy.chunks, plan.architecture, origins)
    if model.hf is not None or model.init_checkpoint is not None:
        policy.reload_optimizer_weights()


def _load_checkpoint(
    key: str,
    path: Path,
    chunks: Sequence[LanguageModel],
    architecture: Architecture,
    origins: Origins,
) -> None:
    found = load_weights(chunks, origins.checkpoint(key, path), architecture=architecture)
    origins.take_checkpoint(key, path, found)


# A request from outside to end a run early: at the next step boundary, with a checkpoint.


SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
STOP_FILE = "SFTRL_STOP_FILE"
"""Environment variable: path of a file whose appearance asks as well. Who stops a job on many nodes has one
place to write to, and signals no process that a rank has started (a verifier, a compiler)."""


class StopRequest:
    """Notes SIGUSR1 and SIGTERM while it is entered; every rank answers alike whether there was one.

    Slurm sends SIGTERM to what it preempts and, where asked for, SIGUSR1 ahead of a time limit.
    """

    def __init__(self) -> None:
        self._received = 0
        file = os.environ.get(STOP_FILE)
        self._file = Path(file) if file else None
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)
            # A system call of gloo or NCCL shall go on after the signal, not fail.
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:  # None: it was not installed from Python, and cannot be again
                signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, parallel: ParallelContext, *, step: int, num_steps: int) -> bool:
        """Whether any rank was asked to stop; every rank calls it after every step and gets the same answer.

        Args:
            parallel: this rank's place.
            step: steps done.
            num_steps: of the whole run.
        """
        asked = self._received
        if parallel.rank == 0 and self._file is not None and self._file.exists():
            asked = signal.SIGUSR1
        answer = torch.tensor(int(asked), device=parallel.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        if answer and parallel.rank == 0:
            print(
                f"{signal.Signals(int(answer)).name}: stopping after step {step} of {num_steps} with a "
                "checkpoint; the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        return bool(answer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


# The slowest rank of each step, in the metrics and, when it stays the same, on standard error.


class Stragglers:
    """Compares the ranks after every step; every rank makes one and calls it.

    Args:
        policy: whose gradient clock is read.
        parallel: this rank's place.
    """

    def __init__(self, policy: PolicyEngine, parallel: ParallelContext) -> None:
        self._policy, self._parallel = policy, parallel
        places = [Place(host="", stage=0)] * parallel.world_size
        dist.all_gather_object(places, Place(host=socket.gethostname(), stage=parallel.pp_rank))
        self._watch = StragglerWatch(places)

    def numbers(self) -> dict[str, float]:
        """ranks/slowest (its number), its seconds to its own gradients, and how many times its peers'."""
        own = torch.tensor([self._policy.clock.collect()], device=self._parallel.device)
        everyone = own.new_empty(self._parallel.world_size)
        dist.all_gather_into_tensor(everyone, own)
        slowest, warning = self._watch.note(everyone.tolist())
        if warning is not None and self._parallel.rank == 0:
            print(warning, file=sys.stderr, flush=True)
        if slowest is None:
            return {}
        return {
            "ranks/slowest": slowest.rank,
            "ranks/slowest_seconds": slowest.seconds,
            "ranks/slowdown": slowest.slowdown,
        }
