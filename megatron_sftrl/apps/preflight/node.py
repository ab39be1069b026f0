"""What one process knows of its node: name, GPUs, versions."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.engine.device import installed_version
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.tensors import hf_shapes

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "vllm",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One process's view of its node.

    Args:
        node: Slurm's name of the node, or the host's.
        local_processes: processes that the launcher started on the node.
        gpus: name and bytes of memory of each GPU that the process sees.
        versions: of each package that matters, "absent" for none; of Python; and of this code.
    """

    node: str
    local_processes: int
    gpus: tuple[str, ...]
    versions: dict[str, str]


def node_facts() -> NodeFacts:
    """Look at this machine."""
    return NodeFacts(
        node=node_name(),
        local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        # An old driver is counted, and then fails.
        gpus=tuple(map(_gpu, range(torch.cuda.device_count() if torch.cuda.is_available() else 0))),
        versions={
            **{name: installed_version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "cuda": torch.version.cuda or "absent",
            "megatron_sftrl's code": _code_hash(),
        },
    )


def node_name() -> str:
    """Slurm's name of this node where Slurm started us, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_leader() -> bool:
    """This process is the first of its node, and looks at what all processes of a node share."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _code_hash() -> str:
    """Of this package's files: two nodes may have the same version and another state of a checkout."""
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


# The run directory: seen and written by every node, with space for the checkpoints.

_PATIENCE_S = 10.0  # network file systems show a new file to other nodes only after a while
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def existing_ancestor(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    return path if path.is_dir() else existing_ancestor(path.parent)


def leave_mark(directory: Path, name: str) -> None:
    """Write a small file; OSError where the directory cannot be written."""
    (directory / name).write_text(name)


def see_mark(directory: Path, name: str) -> bool:
    """Whether a file that another node has written can be read here, after some patience."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if (directory / name).read_text() == name:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def checkpoint_bytes(config: TrainingConfig, architecture: Architecture) -> int:
    """Bytes of one checkpoint: weights in their dtype; fp32 main weights, moments and moving reference.

    A lower bound: the few megabytes of indexes, random states and tokenizer are left out.
    """
    parameters = sum(map(math.prod, hf_shapes(architecture).values()))
    weights = _BYTES[config.model.dtype]
    moments = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    # A model in fp32 is its own main weights.
    main = 1 if weights < 4 else 0
    moving = config.reference is not None and config.reference.kind == "moving_average"
    return parameters * (weights + 4 * (main + moments + moving))


def space_problem(config: TrainingConfig, architecture: Architecture) -> tuple[str, str | None]:
    """(what was seen, what is wrong): the disk holds the checkpoints that the run keeps, and one more.

    What lies in the run directory already is counted.
    """
    directory = existing_ancestor(config.run_dir)
    there = len(list((config.run_dir / "checkpoints").glob("step-*")))
    still = max(1, config.checkpoint.keep_last + 1 - there)
    one = checkpoint_bytes(config, architecture)
    disk = shutil.disk_usage(directory)
    detail = f"{disk.free / 1e9:.1f} GB free, {still} checkpoint(s) of {one / 1e9:.3f} GB to come"
    # Some network file systems report no sizes at all.
    if disk.total == 0 or disk.free >= still * one:
        return detail, None
    return detail, (
        f"{directory} has {disk.free / 1e9:.1f} GB free and the run will write {still} checkpoint(s) of "
        f"{one / 1e9:.1f} GB before it removes one: free space, choose another run_dir, or lower "
        "checkpoint.keep_last"
    )
