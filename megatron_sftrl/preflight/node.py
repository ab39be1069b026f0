"""What one process knows of its node: name, GPUs, versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

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
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))),
        versions={
            **{name: _version(name) for name in _PACKAGES},
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _code_hash() -> str:
    """Of this package's files: two nodes may have the same version and another state of a checkout."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
