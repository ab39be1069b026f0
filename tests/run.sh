#!/usr/bin/env bash
# Everything that must hold: lint, format, types, unit and distributed tests, other people's programs on what we
# write, and short runs end to end.
# Makes its own environment on a fresh machine. Arguments go to pytest: bash tests/run.sh -k gift
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh test
bash tests/oracles.sh
bash tests/slurm/install.sh
# Compiled once, not in every one of some hundred processes.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff check .
ruff format --check .
pyright
# Two processes of tests, a file in one of them; the short files of unit/, the last, even out the end.
exec python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
