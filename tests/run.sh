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
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
stage lint
ruff check .
ruff format --check .
stage "other people's programs"
bash tests/oracles.sh
bash tests/slurm/install.sh
# Only now: what calls vLLM is checked against the vLLM that is installed here. Beside the tests, where they leave a
# processor alone; what it complains about comes behind theirs.
stage "types, until after the tests"
types="$(mktemp)"
nice -n 5 pyright > "$types" 2>&1 &
pyright=$!
curves="$(mktemp -d)"
trap 'kill "$pyright" 2> /dev/null || true; rm -rf "$types" "$curves"' EXIT
if [ "${SFTRL_TEST_NEWEST:-}" = 1 ]; then
  stage "the newest megatron-core, on Python 3.12"
  python3.12 --version  # on the PATH, with its own name
  python -W ignore -m tests.newest "$curves"
  (
    SFTRL_VENV="$PWD/.venv-newest" SFTRL_PYTHON=python3.12
    source tools/environment.sh test
    python -W ignore -m tests.newest "$curves"
  )
fi
# Two processes of tests, a file in one of them. The folders come in the order of testpaths in pyproject.toml; a
# failure is printed at once (tests/conftest.py).
stage tests
tested=0
python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@" || tested=$?
if ! wait "$pyright"; then
  stage types
  cat "$types"
  exit 1
fi
exit "$tested"
