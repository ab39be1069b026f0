#!/usr/bin/env bash
# Everything that must hold, in stages: lint, types, unit tests, other people's programs on what we write, short runs
# end to end, and every layout against one process.
# Makes its own environment on a fresh machine. Arguments go to pytest: bash tests/run.sh -k gift
set -euo pipefail
cd "$(dirname "$0")/.."

stage() {
  printf '\n== %s (after %d s)\n' "$1" "$SECONDS"
}

stage environment
source tools/environment.sh test
# Compiled once, not in every one of some hundred processes.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
stage lint
ruff check .
ruff format --check .
stage "other people's programs"
bash tests/oracles.sh
bash tests/slurm/install.sh
# Only now: what calls vLLM is checked against the vLLM that is installed here.
stage types
pyright
# Two processes of tests, a file in one of them. The folders come in the order of testpaths in pyproject.toml; a
# failure is printed at once (tests/conftest.py).
stage tests
exec python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
