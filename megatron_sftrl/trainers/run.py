"""What every trainer does around its loop: begin or go on, follow the policy, and write numbers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shlex
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Generic

import torch
import torch.distributed as dist

from megatron_sftrl.config.gates import GRPO_GATES
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.data.conversation import read_prompt
from megatron_sftrl.data.formats import recognise
from megatron_sftrl.data.rows import read_rows
from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState
from megatron_sftrl.engine.live_weights import load_hf_weights
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.objective import StepReport
from megatron_sftrl.engine.optimizer import OptimStep
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import Base, PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel, SharedReference
from megatron_sftrl.engine.together import SharedProgress, on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.models.architecture import Architecture, num_parameters
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.observability.metrics import MetricsWriter, open_metrics, read_metrics
from megatron_sftrl.observability.run_directory import RunDirectory, open_run_directory
from megatron_sftrl.observability.run_lock import RunLock
from megatron_sftrl.observability.watch import HangWatch, Place, StragglerWatch, Timers, peak_memory_bytes
from megatron_sftrl.trainers.adapters import load_model, load_start, open_start
from megatron_sftrl.trainers.checked import CheckedRun, ConfigT, export_assets
from megatron_sftrl.trainers.guards import (
    Crossing,
    Gates,
    no_gradient_warning,
    stop_at,
    stop_on_nonfinite_streak,
    tell,
)
from megatron_sftrl.trainers.origins import Origins

LOGGER = logging.getLogger(__name__)


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


# What a loop has around its steps.


class Run(Generic[ConfigT]):
    """Models, checkpoints, metrics and watches of one run, and when each is due; the loop has the steps.

    Args:
        directory: that it holds.
        stop: asked after every step.
        fingerprint, columns: of the training data, and what it covers, for messages.
        held_out, sometimes: as for Gates.
    Raises:
        UserError: on every rank: weights that cannot be read, or are not those that the run began with.
    """

    def __init__(
        self,
        checked: CheckedRun[ConfigT],
        directory: RunDirectory,
        parallel: ParallelContext,
        stop: StopRequest,
        *,
        num_steps: int,
        fingerprint: str,
        columns: str,
        held_out: Sequence[str] | None,
        sometimes: Sequence[str] = (),
    ) -> None:
        config = checked.config
        self.config, self.loss, self.directory, self.parallel = config, checked.loss, directory, parallel
        self._num_positions = checked.architecture.max_position_embeddings
        self.num_steps = num_steps
        many = "es" if parallel.world_size > 1 else ""
        LOGGER.info("starting on %d process%s, %s", parallel.world_size, many, parallel.device.type)
        self._stop, self._fingerprint, self._columns = stop, fingerprint, columns
        self.watch = HangWatch(config.train.hang_minutes)
        self.store = CheckpointStore(
            directory.checkpoints,
            parallel,
            keep_last=config.checkpoint.keep_last,
            assets=export_assets(checked),
            async_save=config.checkpoint.async_save,
            on_progress=self.watch.moved,
        )
        is_resumed = self.store.latest() is not None
        self._origins = Origins(directory, is_resumed=is_resumed)
        self.policy, self.reference = build_models(checked, parallel, self._origins, is_resumed=is_resumed)
        self.policy.on_microbatch = self.watch.moved
        self.state = TrainerState(data_fingerprint=fingerprint)
        self._gates = Gates(
            config.gates,
            defaults=(*checked.loss.config.default_gates(), *(GRPO_GATES if config.grpo else ())),
            held_out=held_out,
            sometimes=sometimes,
        )
        self._stragglers = Stragglers(self.policy, parallel)
        synchronize = torch.cuda.synchronize if parallel.device.type == "cuda" else None
        self.timers = Timers(synchronize=synchronize, on_end=self.watch.moved)
        self._metrics = MetricsWriter([])
        self._last_checkpoint: Path | None = None
        self._is_learning_checked = self._is_asked = False

    def begin(self) -> None:
        """Go on from the run's latest checkpoint or start at step 0, and take the directory as this run's.

        Only now: a bad row, max_length or init_checkpoint can then be corrected without meeting the
        resolved.yaml of a run that never began, and being refused as another run.

        Raises:
            UserError: the checkpoint was trained on other data.
        """
        latest = self.store.latest()
        if latest is None:
            LOGGER.info("starting fresh: %d steps, in %s", self.num_steps, self.directory.path)
        else:
            self.state = self.store.load(latest, self.policy, self.reference)
            if self.state.data_fingerprint != self._fingerprint:
                raise UserError(
                    f"data.train is not what {latest} was trained on: its {self._columns} changed, so the "
                    "run would go on with other samples; restore the data, or choose another run_dir"
                )
            self._gates.starts = dict(self.state.gate_starts)
            LOGGER.info("resumed from step %d of %d: %s", self.state.step, self.num_steps, latest)
        on_rank_zero(lambda: begin_run(self.config, self._origins))

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the loop: rank 0 writes metrics, the watch runs, and the last checkpoint is waited for.

        Raises:
            UserError, RuntimeError: on every rank, when rank 0 cannot open what it must write to.
        """

        def open_sinks() -> MetricsWriter:
            if self.parallel.rank > 0:
                return MetricsWriter([])
            return open_metrics(
                self.directory, self.config, resume_step=self.state.step, total_steps=self.num_steps
            )

        with on_every_rank(open_sinks) as self._metrics, self.watch, self.store:
            yield
        dist.barrier()
        self._last_checkpoint = self.store.latest()

    def tell_end(self) -> None:
        """Say on rank 0 where the result of a finished run is, and what can be done with it.

        Called when engines, workers and process groups are closed: what they print stays above.
        """
        checkpoint = self._last_checkpoint
        if not self.is_finished or checkpoint is None or self.parallel.rank > 0:
            return
        LOGGER.info("finished %d steps: %s", self.num_steps, self.directory.path)
        LOGGER.info("last checkpoint: %s", checkpoint)
        if numbers := last_numbers(self.directory):
            LOGGER.info("last numbers: %s", numbers)
        # Of the whole job, where some of its processes only generate.
        world_size = int(os.environ.get("WORLD_SIZE", self.parallel.world_size))
        for line in next_commands(
            self.config,
            checkpoint,
            num_positions=self._num_positions,
            world_size=world_size,
            per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        ):
            LOGGER.info("%s", line)

    @property
    def is_finished(self) -> bool:
        return self.state.step >= self.num_steps

    @property
    def goes_on(self) -> bool:
        """There is another step to do, and no request to stop."""
        return not self.is_finished and not self._is_asked

    def is_due(self, every: int, *, steps: int = 0) -> bool:
        """After every `every` steps, and at the end of the run in any case: now, or in so many steps."""
        step = self.state.step + steps
        return step >= self.num_steps or (every > 0 and step % every == 0)

    @property
    def is_evaluation_due(self) -> bool:
        """The step that has just been done is followed by an evaluation."""
        return self.is_due(self.config.train.eval_every)

    def follow(self, *, steps_done: int) -> None:
        """Move a reference that follows the policy, where it is due."""
        if self.reference is not None and self.reference.is_due(steps_done):
            self.policy.gather_parameters()
            self.reference.follow(self.policy.chunks)

    def optimize(self, step: int, report: StepReport) -> OptimStep:
        """One update from the gradients that are there; the state counts it, skipped or not."""
        update = self.policy.optim_step(step, num_steps=self.num_steps, loss=report.loss)
        self.state = replace(
            self.state,
            skipped_steps=self.state.skipped_steps + update.is_skipped,
            consecutive_skipped_steps=(self.state.consecutive_skipped_steps + 1) * update.is_skipped,
        )
        return update

    def check_learning(self, report: StepReport, *, grad_norm: float, step: int) -> None:
        """Warn of a loss without a gradient, after this process's first update; its samples carry loss."""
        warning = no_gradient_warning(report, grad_norm=grad_norm, loss_name=self.loss.name)
        if warning is not None and not self._is_learning_checked and self.parallel.rank == 0:
            LOGGER.warning("step %d: %s", step, warning)
        self._is_learning_checked = True

    def numbers(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """What every step has to tell: skipped updates, seconds of each phase, saves, ranks and memory.

        Raises:
            UserError, RuntimeError: on every rank, when a checkpoint could not be written meanwhile.
        """
        numbers: dict[str, float] = {"skipped_steps": self.state.skipped_steps}
        numbers |= {f"seconds/{phase}": value for phase, value in seconds.items()}
        if (written := self.store.written()) is not None:
            numbers |= {
                "checkpoint/write_seconds": written.seconds,
                "checkpoint/gigabytes_per_second": written.num_bytes / 1e9 / written.seconds,
            }
        return {
            **numbers,
            **self._stragglers.numbers(),
            "peak_memory_bytes": peak_memory_bytes(self.parallel.device),
        }

    def write(self, numbers: Mapping[str, float]) -> None:
        """A step's numbers to every sink; rank 0 only."""
        self._metrics.write(self.state.step, numbers)

    def end_step(self, numbers: Mapping[str, float], *, suspects: Sequence[str], is_whole: bool) -> None:
        """Stop a streak of bad gradients, save when it is due or asked for, and let gates end the run.

        Args:
            suspects: where the samples of the step come from.
            is_whole: the policy was updated, so that every metric of training is there.
        Raises:
            UserError: the streak has reached its limit, or a gate ends the run; a checkpoint is then saved.
        """
        stop_on_nonfinite_streak(
            self.state.consecutive_skipped_steps,
            limit=self.config.train.max_nonfinite_steps,
            step=self.state.step,
            suspects=suspects,
            directory=str(self.directory.checkpoints),
        )

        # Times and memory differ between ranks: rank 0's decide, or one rank alone would stop.
        def check() -> tuple[list[Crossing], dict[str, list[float]]]:
            crossings = self._gates.check(self.state.step, numbers, is_whole=is_whole)
            tell(crossings)
            return crossings, dict(self._gates.starts)

        crossings, starts = on_rank_zero(check)
        self.state = replace(self.state, gate_starts=starts)
        is_last = any(crossing.stops for crossing in crossings)
        self._is_asked = self._stop.agreed(self.parallel, step=self.state.step, num_steps=self.num_steps)
        if is_last or self._is_asked or self.is_due(self.config.checkpoint.every):
            with self.timers("checkpoint"):
                self.store.save(self.state, self.policy, self.reference)
        if is_last:
            self.store.finish()
            stop_at(crossings)


# What a finished run says: its last numbers, and commands that take its result, ready to be copied.


_AT_THE_END = ("loss", "reward/mean", "valid/loss", "valid/reward/mean")
_LONGEST_ANSWER = 256


def last_numbers(directory: RunDirectory) -> str:
    """The last loss, reward and evaluation in metrics.jsonl, with their step where it is not the last one."""
    rows, shown = read_metrics(directory.metrics), []
    for name in _AT_THE_END:
        if (row := next((row for row in reversed(rows) if name in row), None)) is not None:
            value = "not finite" if row[name] is None else f"{row[name]:.4g}"
            shown.append(f"{name} {value}" + ("" if row is rows[-1] else f" (step {row['step']:.0f})"))
    return ", ".join(shown)


def next_commands(
    config: TrainingConfig, checkpoint: Path, *, num_positions: int, world_size: int, per_node: int
) -> list[str]:
    """Export, generate and go on, each a line that ends with its command.

    The commands start from resolved.yaml, which holds the overrides of the run's own command, and have as
    many processes as the run's layout needs. Words in capitals are files that the user has to name.

    Args:
        checkpoint: step directory.
        num_positions: longest sequence of the model.
        world_size, per_node: processes of the run, and those on one node.
    """
    run_dir, resolved = config.run_dir, str(RunDirectory(path=config.run_dir).resolved)
    step, grpo = checkpoint.name, config.grpo
    longest = grpo.rollout.max_new_tokens if grpo else min(_LONGEST_ANSWER, num_positions // 2)
    layout = config.parallel
    experts = (layout.etp or layout.tp) * layout.ep * layout.pp
    smallest = math.lcm(layout.tp * layout.pp * layout.cp, experts)
    num_training = world_size - (grpo.rollout.devices if grpo else 0)
    one_copy = _program(smallest if smallest <= per_node else num_training, per_node)
    generate = [
        *("generate", resolved, "--checkpoint", str(checkpoint), "--prompts", _held_out_prompts(config)),
        *("--out", str(run_dir / f"responses-{step}.jsonl"), "--max-new-tokens", str(longest)),
    ]
    export = ["convert", "to-hf", "--checkpoint", str(checkpoint), "--out", str(run_dir / f"hf-{step}")]
    if grpo:
        label, more = "go on from here in a new run", ["grpo", resolved, *_as_new_run(config, checkpoint)]
    else:
        label, more = "go on with GRPO", ["grpo", "GRPO.yaml", f"model.init_checkpoint={checkpoint}"]
    commands = [f"export: sftrl {shlex.join(export)}", f"try it: {one_copy} {shlex.join(generate)}"]
    if config.lora is None:  # a further run of adapters starts from the export
        commands.append(f"{label}: {_program(world_size, per_node)} {shlex.join(more)}")
    return commands


def _program(processes: int, per_node: int) -> str:
    """The start of a command on so many processes; on several nodes it is given on each of them."""
    if processes == 1:
        return "sftrl"
    nodes = ""
    if processes > per_node:
        nodes = f"--nnodes {processes // per_node} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 "
    return f"torchrun {nodes}--nproc-per-node {min(processes, per_node)} -m megatron_sftrl"


def _held_out_prompts(config: TrainingConfig) -> str:
    """A file of data.valid whose first row can be asked; `messages` that end with an answer cannot."""
    columns = config.grpo.data.columns if config.grpo is not None else None  # as `sftrl generate` reads them
    for path in config.held_out:
        with contextlib.suppress(UserError, OSError, StopIteration):
            row = next(read_rows(path)).values
            read_prompt(recognise(row, "prompts", columns).said_by(row, "prompts", columns))
            return str(path)
    return "PROMPTS.jsonl"


def _as_new_run(config: TrainingConfig, checkpoint: Path) -> list[str]:
    """Overrides that make another run of the same settings, from this one's weights."""
    names = (Path(f"{config.run_dir}-{number}") for number in itertools.count(2))
    changes = [f"run_dir={next(name for name in names if not name.exists())}"]
    if config.model.hf is not None:  # it names weights as well, and two starts are refused
        changes += ["model.hf=null", "model.allow_pickle=null", f"model.hf_config={config.model.hf}"]
    return [*changes, f"model.init_checkpoint={checkpoint}"]


# The models of a run, with the weights that it starts from.


def build_models(
    checked: CheckedRun[ConfigT], parallel: ParallelContext, origins: Origins, *, is_resumed: bool
) -> tuple[PolicyEngine, ReferenceModel | None]:
    """The policy at its initial weights, and its reference where the run has one.

    A frozen reference is the policy before its first step (or reference.checkpoint); it is derived again at
    every start, before a checkpoint moves the policy on, and so needs no place in a checkpoint.

    Args:
        is_resumed: a checkpoint of the run follows. Initial weights that nothing is derived from are then not
            read: they may be gone.
    Raises:
        UserError: on every rank: weights that cannot be read, or are not those that the run began with.
    """
    config, architecture = checked.config, checked.architecture
    policy = PolicyEngine(architecture, config, parallel)
    LOGGER.info(
        "built %s: %s parameters, %s; tp %d, pp %d, cp %d, ep %d, dp %d",
        architecture.family,
        f"{num_parameters(architecture):,}",
        config.model.dtype,
        parallel.tp_size,
        parallel.pp_size,
        parallel.cp_size,
        parallel.ep_size,
        parallel.dp_size,
    )
    section = config.reference
    is_derived = section is not None and section.kind == "frozen" and section.checkpoint is None
    if is_derived or not is_resumed or config.lora is not None:
        _load_start(checked, policy, origins)
    if config.reference is None:
        return policy, None
    if config.lora is not None and config.reference.checkpoint is None:
        keeps_start = config.lora.start is not None
        return policy, SharedReference(config.reference, parallel, policy.chunks, keeps_start=keeps_start)
    if config.lora is not None:
        LOGGER.info(
            "reference.checkpoint with lora: the reference is a second copy of the whole model; without it, "
            "the policy's weights with other adapters"
        )
    reference = ReferenceModel(checked.architecture, config, config.reference, parallel)
    if config.reference.checkpoint is not None:
        _load_checkpoint(
            "reference.checkpoint",
            config.reference.checkpoint,
            reference.chunks,
            checked.architecture,
            origins,
            parallel,
        )
    else:
        reference.copy_from(policy.chunks)
    return policy, reference


def _load_start(checked: CheckedRun[ConfigT], policy: PolicyEngine, origins: Origins) -> None:
    """Initial weights from files, where the run names any."""
    model = checked.config.model
    if model.hf is not None:
        with open_weights(model.hf, allow_pickle=model.allow_pickle) as weights:
            load_hf_weights(policy.chunks, weights, checked.architecture, policy.parallel)
            content = origins.take_hf("model.hf", model.hf, weights)
            policy.base = Base(path=str(model.hf.resolve()), weights=content)
            LOGGER.info("weights from model.hf: %s", model.hf)
    if model.init_checkpoint is not None:
        key = "model.init_checkpoint"
        _load_checkpoint(
            key, model.init_checkpoint, policy.chunks, checked.architecture, origins, policy.parallel
        )
    if (lora := checked.config.lora) is not None and lora.start is not None:
        with open_start(checked.config, checked.architecture) as weights:
            origins.take_hf("lora.start", lora.start, weights)
            load_start(policy, checked.config, weights)
    if model.hf is not None or model.init_checkpoint is not None:
        policy.reload_optimizer_weights()


def _load_checkpoint(
    key: str,
    path: Path,
    chunks: Sequence[LanguageModel],
    architecture: Architecture,
    origins: Origins,
    parallel: ParallelContext,
) -> None:
    place = origins.checkpoint(key, path)
    found = load_model(chunks, place, architecture=architecture, parallel=parallel)
    origins.take_checkpoint(key, path, found)
    LOGGER.info("weights from %s: %s", key, found.path)


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
            # A system call of gloo or NCCL goes on after the signal instead of failing.
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:  # None: it was not installed from Python, and cannot be again
                signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, parallel: ParallelContext, *, step: int, num_steps: int) -> bool:
        """Whether any rank was asked to stop; every rank asks after every step and gets the same answer."""
        asked = self._received
        if parallel.rank == 0 and self._file is not None and self._file.exists():
            asked = signal.SIGUSR1
        answer = torch.tensor(int(asked), device=parallel.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        if answer and parallel.rank == 0:
            LOGGER.info(
                "%s: stopping after step %d of %d with a checkpoint; the same command goes on from there",
                signal.Signals(int(answer)).name,
                step,
                num_steps,
            )
        return bool(answer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


def shared_progress(parallel: ParallelContext, watch: HangWatch, *, hang_minutes: float) -> SharedProgress:
    """What moves on any rank, told to every rank's watch, often enough for it; every rank calls this."""
    seconds = min(1.0, hang_minutes * 60 / 10) if hang_minutes else 1.0
    return SharedProgress(parallel, watch.moved, seconds=seconds)


# The slowest rank of each step, in the metrics and, when it stays the same, on standard error.


class Stragglers:
    """Compares the ranks by the policy's gradient clock; every rank makes one and calls it every step."""

    def __init__(self, policy: PolicyEngine, parallel: ParallelContext) -> None:
        self._policy, self._parallel = policy, parallel
        places = [Place(host="", stage=0)] * parallel.world_size
        dist.all_gather_object(places, Place(host=socket.gethostname(), stage=parallel.pp_rank))
        self._watch = StragglerWatch(places)

    def numbers(self) -> dict[str, float]:
        """ranks/slowest (its number), its seconds to its own gradients, and how many times its peers'."""
        own = torch.tensor([self._policy.clock.collect()], device=self._parallel.device)
        everyone = [torch.empty_like(own) for _ in range(self._parallel.world_size)]
        dist.all_gather(everyone, own)
        slowest, warning = self._watch.note(torch.cat(everyone).tolist())
        if warning is not None and self._parallel.rank == 0:
            LOGGER.warning(warning)
        if slowest is None:
            return {}
        return {
            "ranks/slowest": slowest.rank,
            "ranks/slowest_seconds": slowest.seconds,
            "ranks/slowdown": slowest.slowdown,
        }
