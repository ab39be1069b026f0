"""Says of this Python environment whether a run could use the GPUs of this machine: the end of install.sh."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import torch

MODULES = {
    "transformer-engine": "transformer_engine.pytorch",
    "megatron-core": "megatron.core",
    "vllm": "vllm",
}


def main() -> int:
    """0, or 1 where a package of GPU runs does not import, or torch does not see this machine's GPUs."""
    print(f"torch {torch.__version__}, for CUDA {torch.version.cuda}")
    problems = [*filter(None, map(_import_problem, MODULES))]
    # Only now: on a machine without GPUs the engine keeps Transformer Engine from being imported.
    from megatron_sftrl.engine.device import unseen_gpus

    if problem := unseen_gpus():
        problems.append(problem)
    elif torch.cuda.is_available():
        print(f"CUDA: {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    else:
        print("no GPU on this machine: bash slurm/install.sh --check on a GPU node looks at those")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def _import_problem(package: str) -> str | None:
    try:
        importlib.import_module(MODULES[package])
    except Exception as error:
        return f"{package} does not import: {type(error).__name__}: {error}"
    print(f"{package} {importlib.metadata.version(package)} imports")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
