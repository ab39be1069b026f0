"""Looks at each node before the first step of a job: one task per node, a minute at most.

    check_node.py LOGS PROCESSES [KIND CONFIG key=value ...]

The first node reads the configuration and leaves a mark beside the run's directory; every node tells in LOGS
what it sees; the first node compares, names each node that differs, and ends the job.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sftrl.errors import UserError, error_of

SECONDS_TO_SEE = 10.0
"""What a directory shared over NFS may take to show another node's file."""
SECONDS_TO_READ = 300.0
"""What the first node may take to import Python packages from a cold disk and to read the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What a node has, and whether it sees the run's directory.

    Args:
        node: its name.
        gpus: how many; -1 where the job asked for none.
        types: their names, each once, sorted; none where they cannot be asked.
        is_shared: it sees the directory.
    """

    node: str
    gpus: int
    types: list[str]
    is_shared: bool


def main(arguments: list[str]) -> int:
    """0, or 2 with what is wrong on standard error and a mark in LOGS; any other code may pass."""
    logs, processes, run = Path(arguments[0]), int(arguments[1]), arguments[2:]
    index, num_nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    attempt = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    folder = logs / f"check-{attempt}"
    if index > 0:
        where = _appears(folder / "where", seconds=SECONDS_TO_READ)
        is_shared = where is not None and _appears(Path(where.read_text())) is not None
        return _report(folder, index, is_shared=is_shared)
    try:
        mark = _mark(_run_directory(run, logs), attempt)
    except UserError as error:
        return _refuse(logs, [str(error)])
    try:
        folder.mkdir(exist_ok=True)
        _write(folder / "where", str(mark))
        _report(folder, index, is_shared=True)
        return _refuse(logs, _problems(folder, num_nodes, processes, mark.parent, logs))
    finally:
        mark.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _run_directory(run: list[str], logs: Path) -> Path:
    """Of a training run, also noted for common.sh; a tool has none and its logs stand for it."""
    if not run:
        return logs
    from read_config import run_directory  # imports what only the first node needs

    directory = run_directory(*run)
    _write(logs / "run_dir", str(directory))
    return directory


def _mark(directory: Path, attempt: str) -> Path:
    """A file in the directory, or in the nearest one above it that exists."""
    existing = next(path for path in (directory, *directory.parents) if path.is_dir())
    mark = existing / f".sftrl-check-{attempt}"
    try:
        mark.touch()
    except OSError as error:
        raise error_of(f"cannot write into {existing}: {error}; choose another run_dir", error) from error
    return mark


def _report(folder: Path, index: int, *, is_shared: bool) -> int:
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    gpus, types = _gpus()
    report = NodeReport(node=node, gpus=gpus, types=types, is_shared=is_shared)
    try:
        _write(folder / f"{index}.json", json.dumps(asdict(report)))
    except OSError as error:
        # The first node refuses, for want of an answer: another code than 0 would end it before it has.
        print(f"error: {node} cannot write {folder}: {error}", file=sys.stderr, flush=True)
    return 0


def _gpus() -> tuple[int, list[str]]:
    """GPUs that answer on this node, and their types: one off the bus is still in Slurm's books."""
    in_books = int(os.environ.get("SLURM_GPUS_ON_NODE", "-1"))
    if not shutil.which("nvidia-smi"):
        return in_books, []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    answering = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    # GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-...)
    types = sorted({line.partition(": ")[2].partition(" (UUID")[0].strip() for line in answering})
    # Nodes without GPUs may have the program, too.
    return len(answering) if answering or "SLURM_GPUS_PER_NODE" in os.environ else in_books, types


def _problems(folder: Path, num_nodes: int, processes: int, shared: Path, logs: Path) -> list[str]:
    problems: list[str] = []
    reports: list[NodeReport] = []
    names = os.environ["SFTRL_LAUNCH_NODES"].split()
    for index in range(num_nodes):
        file = _appears(folder / f"{index}.json", seconds=2 * SECONDS_TO_SEE)
        if file is None:
            problems.append(f"{names[index]} did not answer in {logs}: all nodes must share this directory")
        else:
            reports.append(NodeReport(**json.loads(file.read_text())))
    for report in reports:
        if not report.is_shared:
            problems.append(
                f"{report.node} does not see {shared}, where the run is written: it must be shared"
            )
        if report.gpus != reports[0].gpus or -1 < report.gpus < processes:
            problems.append(
                f"{report.node} has {report.gpus} GPUs, {reports[0].node} has {reports[0].gpus}, and "
                f"{processes} processes are to run on each: leave a node out (sbatch --exclude), "
                "or set SFTRL_PROCESSES"
            )
    return [*problems, *_mixed_types(reports)]


def _mixed_types(reports: list[NodeReport]) -> list[str]:
    """The slowest GPU would set the pace and the smallest the memory, and kernels would round differently."""
    nodes: dict[str, list[str]] = {}
    for report in reports:
        for name in report.types:
            nodes.setdefault(name, []).append(report.node)
    if len(nodes) < 2:
        return []
    seen = "; ".join(f"{name}: {' '.join(names)}" for name, names in nodes.items())
    return [
        f"the nodes have GPUs of {len(nodes)} types ({seen}): ask for one (sbatch --gpus-per-node=TYPE:N or "
        "--constraint), or leave nodes out (sbatch --exclude)"
    ]


def _appears(path: Path, *, seconds: float = SECONDS_TO_SEE) -> Path | None:
    """The file once it is there.

    Listing makes a network file system look again; asking for the name may be answered from memory.
    """
    deadline = time.monotonic() + seconds
    while True:
        if path.parent.is_dir() and path.name in os.listdir(path.parent):
            return path
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)


def _write(path: Path, text: str) -> None:
    """Whole or not at all: others wait for it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def _refuse(logs: Path, problems: list[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if not problems:
        return 0
    (logs / "refused").touch()
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
