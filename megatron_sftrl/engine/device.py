"""What this process computes with: the GPU or the CPU, and Transformer Engine or PyTorch's own operators."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sftrl.config.schema import ModelSection, ParallelSection, TrainingConfig
from megatron_sftrl.engine import cpu_backend
from megatron_sftrl.errors import UserError

_CHOICE = "SFTRL_DEVICE"


def before_megatron() -> None:
    """Choose the CPU where SFTRL_DEVICE=cpu asks for it, look at Transformer Engine, import megatron.core.

    Before any other import of megatron.core, which imports Transformer Engine, and before CUDA starts.
    """
    if os.environ.get(_CHOICE) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    transformer_engine()
    cpu_backend.import_megatron()


def check_device(config: TrainingConfig) -> None:
    """Refuse to compute with something else than was meant; before anything is built.

    Raises:
        UserError: GPUs that torch cannot see, or layers that this process cannot have.
    """
    order_launches(config.parallel)
    if (chosen := os.environ.get(_CHOICE, "")) not in ("", "cpu"):
        raise UserError(
            f"{_CHOICE}: expected cpu, or nothing for the GPUs where there are any; got '{chosen}'"
        )
    if problem := unseen_gpus():
        raise UserError(problem)
    _check_layers(config.model)


def order_launches(parallel: ParallelSection) -> None:
    """Let kernels run in the order of their launches, which overlap with tp and cp needs; before CUDA starts.

    An environment variable, which is left as it is where it is set.
    """
    if parallel.tp > 1 or parallel.cp > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def select_device() -> torch.device:
    """This process's GPU, by LOCAL_RANK, made the current one; the CPU where CUDA is not there."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start_torch_distributed(
    device: torch.device, *, rank: int, world_size: int, timeout: timedelta, store: dist.Store | None
) -> None:
    """The group of all processes: NCCL on GPUs, gloo on the CPU. `store` is torchrun's when None is given."""
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        # NCCL connects now, not in the first step, and a barrier knows its GPU. gloo takes no device.
        device_id=device if is_cuda else None,
    )


# Transformer Engine: what of it can be used, asked once.


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerEngine:
    """Whether its layers can be used in this process.

    Args:
        problem: why not, its own error included; None when they can.
        is_broken: it is installed, and does not import.
    """

    problem: str | None
    is_broken: bool = False


@functools.cache
def transformer_engine() -> TransformerEngine:
    """Import it where CUDA is there; where it is of no use, megatron.core will not find it either.

    megatron.core imports it at many places and takes nothing but ImportError for its absence: what else a
    broken installation raises would end the import of megatron.core. Without CUDA, megatron.core would take
    its optimizer, which runs on GPUs alone.
    """
    # Asks the driver's library; torch.cuda.is_available() would start CUDA.
    if torch.cuda.device_count() == 0:
        _hide_transformer_engine()
        return TransformerEngine(problem="there is no CUDA: torch sees no GPU")
    if importlib.util.find_spec("transformer_engine") is None:
        return TransformerEngine(problem="it is not installed")
    try:
        # The package alone imports without an error where its extension for torch does not.
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        _hide_transformer_engine()
        return TransformerEngine(problem=f"it does not import: {_told(error)}", is_broken=True)
    core, engine = map(installed_version, ("megatron-core", "transformer-engine"))
    pair = f"megatron-core {core} and Transformer Engine {engine}"
    try:
        extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    except Exception as error:
        # What has been imported of megatron.core by now counts on Transformer Engine.
        raise UserError(
            f"{pair} do not go together: {_told(error)}; docs/cluster.md names versions that do, and without "
            "transformer-engine (pip uninstall) layers are PyTorch's"
        ) from error
    if not extension.HAVE_TE:
        return TransformerEngine(problem=f"{pair} do not go together", is_broken=True)
    return TransformerEngine(problem=None)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def installed_version(package: str) -> str:
    """What pip knows of a package, or absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _hide_transformer_engine() -> None:
    """Python's own way to make an import raise ModuleNotFoundError."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    for name in [name for name in sys.modules if re.match(r"transformer_engine(\.|$)", name)]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def _check_layers(model: ModelSection) -> None:
    found = transformer_engine()
    if found.problem is None or model.layers == "torch":
        return
    way_out = "docs/cluster.md says how it is installed, and model.layers: torch does without it"
    if model.layers == "te":
        raise UserError(f"model.layers: te needs Transformer Engine, but {found.problem}; {way_out}")
    if found.is_broken:
        raise UserError(f"model.layers: auto finds Transformer Engine, but {found.problem}; {way_out}")


def try_transformer_engine() -> str:
    """Run one of its layers forward and backward on the current GPU; what was run.

    Raises:
        UserError: with its own error.
    """
    from transformer_engine.pytorch import TransformerLayer  # type: ignore[import-not-found]

    width, tokens = 256, 64
    try:
        layer = TransformerLayer(
            width,
            2 * width,
            4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            self_attn_mask_type="causal",
            normalization="RMSNorm",
            activation="swiglu",
            bias=False,
            params_dtype=torch.bfloat16,
            device="cuda",
        )
        states = torch.ones(tokens, 1, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        layer(states).sum().backward()
        is_finite = states.grad is not None and bool(states.grad.isfinite().all())
    except Exception as error:
        raise UserError(f"Transformer Engine cannot run a layer: {_told(error)}") from error
    if not is_finite:
        raise UserError("Transformer Engine's layer gives gradients that are not finite")
    return f"Transformer Engine {installed_version('transformer-engine')}: one layer, forward and backward"


# GPUs that are there, and that torch does not see: the run would train on the CPU without a word.

_HIDING = ("", "-1", "NoDevFiles")
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Of each major version of CUDA; programs of its later minor versions run with it as well."""


def unseen_gpus(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> str | None:
    """What shows that there are GPUs and why torch sees none; None where it sees some, or none is there.

    Args:
        root: of the file system that is looked at.
    """
    if torch.cuda.is_available() or environ.get(_CHOICE) == "cpu":
        return None
    local = _local_signs(root, environ)
    signs = [*local, *_slurm_signs(environ)]
    if not signs:
        return None
    return (
        f"there are GPUs ({', '.join(signs)}), and torch sees none: "
        f"{'; '.join(_reasons(root, environ, is_local=bool(local)))}. "
        f"To compute on the CPU on purpose, set {_CHOICE}=cpu"
    )


def _local_signs(root: Path, environ: Mapping[str, str]) -> list[str]:
    """What the driver shows of GPUs in this machine."""
    for folder, pattern in (("dev", r"nvidia\d+"), ("proc/driver/nvidia/gpus", r".*")):
        place = root / folder
        names = os.listdir(place) if place.is_dir() else []
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return [f"{len(found)} in /{folder}"]
    program = shutil.which("nvidia-smi", path=environ.get("PATH", ""))
    if program is None:
        return []
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [line for line in listed.splitlines() if line.startswith("GPU ")]
    return [f"{len(found)} listed by nvidia-smi"] if found else []


def _slurm_signs(environ: Mapping[str, str]) -> list[str]:
    return [
        f"{name}={value}"
        for name, value in sorted(environ.items())
        if re.fullmatch(r"SLURM_(GPUS|GPUS_.*|JOB_GPUS|STEP_GPUS)", name) and value not in ("", "0")
    ]


def _reasons(root: Path, environ: Mapping[str, str], *, is_local: bool) -> list[str]:
    """Why torch sees none of them, and what to do; never empty."""
    found = []
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in _HIDING:
        found.append(f"CUDA_VISIBLE_DEVICES='{visible}' hides them, unset it")
    if torch.version.cuda is None:
        found.append(f"torch {torch.__version__} is built for the CPU, install a build for CUDA")
    elif (driver := _driver(root)) is not None:
        major = int(torch.version.cuda.split(".")[0])
        oldest = _OLDEST_DRIVER.get(major, 0)
        if int(driver.split(".")[0]) < oldest:
            found.append(
                f"the driver is {driver}, and torch {torch.__version__} for CUDA {torch.version.cuda} needs "
                f"{oldest} or newer: update it, or install torch for an older CUDA"
            )
    if not is_local:
        found.append("Slurm's job has GPUs and this machine shows none: start the command on them, with srun")
    return found or [_own_error()]


def _driver(root: Path) -> str | None:
    """The version of the driver, such as 535.104.05; None where it says none."""
    file = root / "proc/driver/nvidia/version"
    if not file.is_file():
        return None
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
    # NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build ...
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", file.read_text(), re.MULTILINE)
    return found and found[1]


def _own_error() -> str:
    """Of CUDA, when it is started."""
    try:
        torch.cuda.init()
    except Exception as error:
        return _told(error)
    return "torch gives no reason; a container without its GPUs (docker --gpus all, apptainer --nv) has none"
