"""GPU or CPU, and whose layers: what was meant, or a refusal that says why."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_sftrl.config.schema import ParallelSection
from megatron_sftrl.engine import cpu_backend, device, parallel
from megatron_sftrl.errors import UserError
from tests.ranks import ROOT
from tests.unit.config.example import EXAMPLE, example

# `sftrl sft` beside packages that stand for installations of Transformer Engine, each in a process of its
# own: an import happens once. The example's tokenizer is not there, which is what is looked at next.

FAKES = {
    # Built for another torch: the package swallows the ImportError, as the real one does.
    "other_torch": {
        "__init__.py": "try:\n    from . import pytorch\nexcept ImportError:\n    pass\n",
        "pytorch/__init__.py": "raise ImportError('undefined symbol: _ZN3c105')\n",
    },
    "mismatch": {"__init__.py": "raise AssertionError('package version mismatch')\n"},
    # Imports, and has nothing of what megatron-core asks for.
    "other_names": {"__init__.py": "__version__ = '9.0'\n", "pytorch/__init__.py": ""},
    "none": {},
}
COMMANDS = """
import sys, torch
if sys.argv[2] == "cuda":
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
from megatron_sftrl.cli import main
for layers in sys.argv[3:]:
    main(["sft", sys.argv[1], f"model.layers={layers}"])
    print("== end", file=sys.stderr)
"""
NEXT = "tokenizer.path"


def said(fake: str, machine: str, folder: Path, *asked: str) -> dict[str, str]:
    """By model.layers: what `sftrl sft` has written on standard error."""
    for name, text in FAKES[fake].items():
        path = folder / "transformer_engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "run.yaml").write_text(EXAMPLE)
    asked = asked or ("te", "auto", "torch")
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(folder / "run.yaml"), machine, *asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *told, rest = done.stderr.split("== end\n")
    assert not rest.strip()
    return dict(zip(asked, told, strict=True))


@pytest.mark.parametrize(
    ("fake", "error"),
    [
        ("other_torch", "it does not import: ImportError: undefined symbol: _ZN3c105"),
        ("mismatch", "it does not import: AssertionError: package version mismatch"),
    ],
)
def test_a_broken_transformer_engine_is_refused_with_its_error_and_torch_is_the_way_out(
    fake: str, error: str, tmp_path: Path
) -> None:
    found = said(fake, "cuda", tmp_path)
    assert f"model.layers: te needs Transformer Engine, but {error}" in found["te"]
    assert f"model.layers: auto finds Transformer Engine, but {error}" in found["auto"]
    for layers in ("te", "auto"):
        assert "model.layers: torch does without it" in found[layers]
        assert NEXT not in found[layers]
    assert NEXT in found["torch"]
    assert error not in found["torch"]


def test_a_transformer_engine_beside_which_megatron_core_does_not_import_is_told(tmp_path: Path) -> None:
    (text,) = said("other_names", "cuda", tmp_path, "torch").values()
    assert "do not go together: ModuleNotFoundError: No module named 'transformer_engine.pytorch." in text
    assert "pip uninstall" in text


def test_a_transformer_engine_that_megatron_core_does_not_use_is_broken_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(HAVE_TE=False))
    monkeypatch.setattr(device, "transformer_engine", device.transformer_engine.__wrapped__)
    with pytest.raises(UserError, match=r"auto finds Transformer Engine, but megatron-core .* do not go"):
        device.check_device(example())
    device.check_device(example("model.layers=torch"))


def test_without_transformer_engine_only_te_is_refused(tmp_path: Path) -> None:
    found = said("none", "cuda", tmp_path)
    assert "model.layers: te needs Transformer Engine, but it is not installed" in found["te"]
    assert NEXT in found["auto"]
    assert NEXT in found["torch"]


def test_without_cuda_nothing_of_transformer_engine_is_imported(tmp_path: Path) -> None:
    found = said("mismatch", "cpu", tmp_path)
    assert "te needs Transformer Engine, but there is no CUDA" in found["te"]
    assert NEXT in found["auto"]
    assert NEXT in found["torch"]


# GPUs that torch does not see, on machines that are folders.


def machine(root: Path, *, gpus: int = 8, driver: str | None = None) -> Path:
    """A root directory with devices, and with a driver of this version."""
    (root / "dev").mkdir()
    for name in ("null", "nvidiactl", *(f"nvidia{index}" for index in range(gpus))):
        (root / "dev" / name).touch()
    if driver is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(driver)
    return root


CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\n"


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose torch sees no GPU, for the functions that are called here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("SFTRL_DEVICE", raising=False)


def test_a_machine_without_gpus_is_none_of_our_business(tmp_path: Path) -> None:
    assert device.unseen_gpus(machine(tmp_path, gpus=0), {"PATH": ""}) is None
    assert device.unseen_gpus(tmp_path, {"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_ID": "7"}) is None


def test_gpus_that_torch_sees_are_not_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.unseen_gpus(machine(tmp_path), {}) is None


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_told_and_the_cpu_can_be_meant(value: str, tmp_path: Path) -> None:
    root = machine(tmp_path, driver=OPEN)
    told = device.unseen_gpus(root, {"CUDA_VISIBLE_DEVICES": value})
    assert told is not None
    assert "8 in /dev" in told
    assert f"CUDA_VISIBLE_DEVICES='{value}' hides them" in told
    assert "SFTRL_DEVICE=cpu" in told
    assert "the driver" not in told
    assert device.unseen_gpus(root, {"CUDA_VISIBLE_DEVICES": value, "SFTRL_DEVICE": "cpu"}) is None


def test_an_old_driver_is_named_with_the_one_that_this_torch_needs(tmp_path: Path) -> None:
    told = device.unseen_gpus(machine(tmp_path, driver=CLOSED), {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert told is not None
    assert "the driver is 535.104.05" in told
    assert "for CUDA 13.0 needs 580 or newer" in told
    assert "hides them" not in told


def test_a_torch_for_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    told = device.unseen_gpus(machine(tmp_path, driver=CLOSED), {})
    assert told is not None
    assert "is built for the CPU" in told
    assert "the driver" not in told


def test_cuda_itself_is_asked_where_nothing_else_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start() -> None:
        raise RuntimeError("Error 802: system not yet initialized")

    monkeypatch.setattr(torch.cuda, "init", start)
    told = device.unseen_gpus(machine(tmp_path, driver=OPEN), {})
    assert told is not None
    assert "RuntimeError: Error 802: system not yet initialized" in told


@pytest.mark.parametrize(
    "name", ["SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS"]
)
def test_what_slurm_gave_counts_on_a_node_that_shows_none(name: str, tmp_path: Path) -> None:
    told = device.unseen_gpus(tmp_path, {name: "h100:8"})
    assert told is not None
    assert f"{name}=h100:8" in told
    assert "with srun" in told


def test_the_driver_s_folder_and_its_program_are_looked_at_too(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / f"a/proc/driver/nvidia/gpus/0000:{index}").mkdir(parents=True)
    told = device.unseen_gpus(tmp_path / "a", {})
    assert told is not None
    assert "2 in /proc/driver/nvidia/gpus" in told
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    told = device.unseen_gpus(tmp_path / "b", {"PATH": str(tmp_path)})
    assert told is not None
    assert "1 listed by nvidia-smi" in told
    program.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert device.unseen_gpus(tmp_path / "b", {"PATH": str(tmp_path)}) is None


def test_a_run_is_refused_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE=8"):
        device.check_device(example())
    monkeypatch.setenv("SFTRL_DEVICE", "cpu")
    device.check_device(example())
    monkeypatch.setenv("SFTRL_DEVICE", "gpu")
    with pytest.raises(UserError, match="SFTRL_DEVICE: expected cpu"):
        device.check_device(example())


def test_the_cpu_by_choice_hides_the_gpus_from_torch() -> None:
    code = "import os, megatron_sftrl.engine; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    seen = {
        choice: subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "3", "SFTRL_DEVICE": choice},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for choice in ("cpu", "")
    }
    assert seen == {"cpu": "''", "": "'3'"}


# What is set before CUDA starts, and how the processes meet.


@pytest.mark.parametrize(
    ("sizes", "before", "after"),
    [
        ({"tp": 2}, None, "1"),
        ({"cp": 2}, None, "1"),
        ({"tp": 2}, "8", "8"),
        ({"pp": 2}, None, None),
    ],
)
def test_launches_are_ordered_before_cuda_is_asked_for(
    sizes: dict[str, int], before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    seen: list[str | None] = []

    def install() -> bool:
        seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        raise InterruptedError

    monkeypatch.setattr(cpu_backend, "install", install)
    with pytest.raises(InterruptedError):
        parallel.initialize_parallel(ParallelSection(**sizes))
    assert seen == [after]


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("cpu", "gloo")])
def test_a_group_on_gpus_knows_the_gpu_of_this_process(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, object] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda name, **how: called.update(how, backend=name))
    chosen = torch.device(kind, 3) if kind == "cuda" else torch.device(kind)
    device.start_torch_distributed(chosen, rank=1, world_size=2, timeout=timedelta(minutes=1), store=None)
    assert called["backend"] == backend
    assert called["device_id"] == (chosen if kind == "cuda" else None)
    assert (called["rank"], called["world_size"]) == (1, 2)
