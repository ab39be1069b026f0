"""Starts the stages of a comparison that are not done: as processes of this machine, or as jobs of Slurm.

A stage is done when its result is on the disk, whoever started it. One that was interrupted goes on from its
last checkpoint, or behind its last answer, since every stage is an ordinary run that does so by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sftrl.apps.compare.config import CompareConfig, LaunchSection
from megatron_sftrl.apps.compare.plan import Stage, left_of
from megatron_sftrl.errors import UserError
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.observability.run_lock import Owner, read_owner

LOGGER = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_ASKING = (1.0, 5.0, 15.0)
"""A controller of Slurm that is busy or restarts answers again within seconds."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ERROR = re.compile(r"^error(?: \(rank \d+\))?: ", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFiles:
    """What stands beside a stage's YAML about its execution."""

    place: Path

    @property
    def log(self) -> Path:
        """Everything its processes have said."""
        return self.place.with_name(f"{self.place.name}.log")

    @property
    def process(self) -> Path:
        """The process that was started for it last; it may outlive the comparison that started it."""
        return self.place.with_name(f"{self.place.name}.pid")

    @property
    def job(self) -> Path:
        """The number of its job in Slurm."""
        return self.place.with_name(f"{self.place.name}.job")

    @property
    def code(self) -> Path:
        """The exit code with which it ended last, where that was not 0."""
        return self.place.with_name(f"{self.place.name}.code")

    def is_running(self) -> bool:
        """As a process of this machine, or as a job that is in Slurm's queue."""
        owner = read_owner(self.process) if self.process.exists() else None
        return (owner is not None and owner.is_alive() is True) or self.queued_job() is not None

    def queued_job(self) -> str | None:
        """Its job's number, while Slurm knows it as waiting or running.

        Raises:
            UserError: squeue does not answer: the job may be there, and must not be submitted twice.
        """
        if not self.job.exists() or shutil.which("squeue") is None:
            return None
        number = self.job.read_text().strip()
        command = ["squeue", "--noheader", "--format=%i", f"--jobs={number}"]
        error = ""
        for pause in (*_SECONDS_BETWEEN_ASKING, None):
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
            if asked.returncode == 0:
                return number if asked.stdout.split() else None
            error = asked.stderr.strip()
            if "Invalid job id" in error:  # so long ended that Slurm has forgotten it
                return None
            if pause is not None:
                time.sleep(pause)
        raise UserError(
            f"squeue does not say whether job {number} of {self.place} is still there ({error}); try again "
            f"when it answers, or remove {self.job} if the job is gone"
        )

    def last_error(self) -> str:
        """What the log says of a stage that has failed."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        if errors := list(_ERROR.finditer(text)):
            return text[errors[-1].end() :].partition("\n(--traceback")[0].strip()
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"no word in {self.log}"


def files_of(config: CompareConfig, stage: Stage) -> StageFiles:
    return StageFiles(place=config.out_dir / stage.name)


def states_of(config: CompareConfig, stages: Sequence[Stage]) -> dict[str, str]:
    """By name: done, running, failed or missing; an interrupted stage is missing: it has to be started."""
    left = {stage.name for stage in left_of(stages)}

    def state(stage: Stage) -> str:
        files = files_of(config, stage)
        if stage.name not in left:
            return "done"
        if files.is_running():
            return "running"
        return "failed" if files.code.exists() else "missing"

    return {stage.name: state(stage) for stage in stages}


# On this machine.


class Local:
    """Runs stages as processes of this machine, `at_once` at the same time.

    Args:
        stages: all of them, in the order of starting; those that need not be run are passed over.
        slots: the GPUs of each stage that runs at the same time.
    """

    def __init__(
        self, config: CompareConfig, stages: Sequence[Stage], slots: Sequence[Sequence[str]]
    ) -> None:
        self._config, self._left = config, left_of(stages)
        self._failed: set[str] = set()
        self._running: dict[str, tuple[Stage, subprocess.Popen[bytes], int]] = {}
        self._slots = slots
        self._is_asked = False

    def run(self) -> bool:
        """Run everything that can be run; a stage behind one that failed is left out, other arms go on.

        Returns:
            False when a signal ended it: the stages that ran were asked to stop with a checkpoint.
        """
        with self._noting_signals():
            while True:
                self._collect()
                if not self._is_asked:
                    self._start_what_can()
                # What is left while nothing runs is in the hands of an earlier comparison's processes.
                if not self._running and (self._is_asked or not self._left):
                    return not self._is_asked
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _collect(self) -> None:
        for name, (stage, process, _) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            files = files_of(self._config, stage)
            if code == 0 and stage.is_done:
                LOGGER.info("%s: done", name)
            elif self._is_asked:
                LOGGER.info("%s: stopped", name)
            else:
                self._failed.add(name)
                write_atomically(files.code, f"{code}\n")
                LOGGER.error("%s: failed with exit code %d: %s", name, code, files.last_error())

    def _start_what_can(self) -> None:
        for stage in list(self._left):
            free = [slot for slot in range(len(self._slots)) if slot not in self._taken()]
            if not free or self._is_asked:
                return
            if stage.is_done or self._is_hopeless(stage):
                self._left.remove(stage)
            elif self._is_ready(stage) and not files_of(self._config, stage).is_running():
                self._left.remove(stage)
                self._start(stage, free[0])

    def _taken(self) -> set[int]:
        return {slot for _, _, slot in self._running.values()}

    def _is_hopeless(self, stage: Stage) -> bool:
        """It needs one that has failed, or that is left out itself."""
        if any(name in self._failed for name in stage.needs):
            self._failed.add(stage.name)
            return True
        return False

    def _is_ready(self, stage: Stage) -> bool:
        unfinished = {each.name for each in self._left if not each.is_done} | set(self._running)
        return not unfinished.intersection(stage.needs)

    def _start(self, stage: Stage, slot: int) -> None:
        files = files_of(self._config, stage)
        files.code.unlink(missing_ok=True)
        environment = dict(os.environ)
        if self._slots[slot]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._slots[slot])
        with files.log.open("ab") as log:
            process = subprocess.Popen(
                command_of(self._config.launch, stage.words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then asks the others to stop
            )
        write_atomically(files.process, json.dumps(asdict(Owner.of(process.pid))) + "\n")
        self._running[stage.name] = (stage, process, slot)
        if self._is_asked:  # the signal came before there was a process to tell it to
            process.send_signal(signal.SIGTERM)
        LOGGER.info("%s: started, log in %s", stage.name, files.log)

    @contextlib.contextmanager
    def _noting_signals(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
            self._is_asked = True
            for _, process, _ in self._running.values():
                process.send_signal(signal.SIGTERM)

        before: dict[signal.Signals, Any] = {each: signal.signal(each, note) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def command_of(launch: LaunchSection, words: Sequence[str]) -> list[str]:
    """The command line of a stage on one node."""
    start = [sys.executable]
    if launch.nproc > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launch.nproc)]
    return [*start, "-m", "megatron_sftrl", *words]


def slots_of(launch: LaunchSection, devices: Sequence[str]) -> list[list[str]]:
    """The GPUs of each stage that runs at the same time; empty lists on the CPU.

    Raises:
        UserError: fewer GPUs than processes.
    """
    needed = launch.at_once * launch.nproc
    if devices and needed > len(devices):
        raise UserError(
            f"launch: at_once {launch.at_once} times nproc {launch.nproc} need {needed} GPUs, and "
            f"{len(devices)} are here"
        )
    size = launch.nproc if devices else 0
    return [list(devices[slot * size : (slot + 1) * size]) for slot in range(launch.at_once)]


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES calls them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return (named or [str(number) for number in range(count)])[:count]


# On a cluster.


def submit(
    config: CompareConfig,
    stages: Sequence[Stage],
    report: Sequence[str],
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Submit a job for each stage that is neither done nor queued, and one that reports when all have ended.

    Args:
        report: words of the command line of `sftrl` that write the report.
    Raises:
        UserError: no sbatch, or it refuses a job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("launch.kind: slurm needs sbatch on the PATH: start it on a login node")
    jobs: dict[str, str] = {}
    for stage in left_of(stages):
        files = files_of(config, stage)
        number = files.queued_job()
        if number is None:
            after = [jobs[name] for name in stage.needs if name in jobs]
            files.code.unlink(missing_ok=True)
            number = _sbatch(config, stage.name, _script(config.launch, stage.words, files), "afterok", after)
            write_atomically(files.job, f"{number}\n")
        jobs[stage.name] = number
        say(f"{stage.name}: job {number}")
    if jobs:
        script = f"#!/bin/bash\nexec {shlex.join([sys.executable, '-m', 'megatron_sftrl', *report])}\n"
        number = _sbatch(config, "report", script, "afterany", list(jobs.values()))
        say(f"report: job {number}")


def _sbatch(config: CompareConfig, name: str, script: str, when: str, after: Sequence[str]) -> str:
    place = config.out_dir / name
    file = place.with_name(f"{place.name}.sh")
    write_atomically(file, script)
    command = ["sbatch", "--parsable", f"--job-name=compare-{name.replace('/', '-')}"]
    command += [f"--output={place.with_name(f'{place.name}.log').absolute()}", "--open-mode=append"]
    command += [f"--nodes={config.launch.nodes}", "--ntasks-per-node=1", *config.launch.sbatch]
    if after:
        command += [f"--dependency={when}:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {file}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _script(launch: LaunchSection, words: Sequence[str], files: StageFiles) -> str:
    """The job of a stage: one task on each node, and torchrun's agents meet at the first one."""
    command = shlex.join(command_of(launch, words))
    head = ""
    if launch.nodes > 1:
        head = 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        agent = f"-m torch.distributed.run --nnodes {launch.nodes} --nproc-per-node {launch.nproc}"
        meeting = '--rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port"'
        head += "port=$((20000 + SLURM_JOB_ID % 10000))\n"
        command = f"{shlex.quote(sys.executable)} {agent} {meeting} -m megatron_sftrl {shlex.join(words)}"
    code = shlex.quote(str(files.code.absolute()))
    tail = f"code=$?\n[ $code = 0 ] || echo $code > {code}\nexit $code\n"
    return f"#!/bin/bash\nrm -f {code}\n{head}srun {command}\n{tail}"
