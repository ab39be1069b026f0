#!/usr/bin/env bash
# Everything that training on H100s needs, in a virtual environment: torch, Transformer Engine, vLLM and this checkout.
#   bash slurm/install.sh            on a login node, or in a job; again at any time, it goes on where it was
#   bash slurm/install.sh --print    only says what it would run
#   bash slurm/install.sh --check    only looks at what is installed; on a GPU node, GPUs as well
# What can be set from outside:
#   SFTRL_VENV      where (.venv of this checkout, which the job scripts look for); on a disk that all nodes share
#   SFTRL_PYTHON    interpreter, 3.11 or 3.12 (python3.12, else python3.11)
#   MAX_JOBS        compilers at a time, where Transformer Engine's extension has to be built (all CPUs)
# GPU nodes need NVIDIA's driver 580 or newer: these wheels are built for CUDA 13. A C++ compiler has to be there; no
# CUDA toolkit has, and one that is there is not used.
set -euo pipefail
home="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${SFTRL_VENV:-$home/.venv}"
torch=torch==2.13.0  # vLLM 0.32 pins it, and what is compiled for one torch does not load with another

refuse() { echo "error: $*" >&2; exit 2; }

run() {
  printf '+%s\n' "$(printf ' %q' "$@")"
  [ "$mode" = --print ] || "$@"
}

find_python() {
  local candidate
  for candidate in ${SFTRL_PYTHON:-python3.12 python3.11}; do
    if "$candidate" -c 'import sys; raise SystemExit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  refuse "no Python 3.11 or 3.12 in '${SFTRL_PYTHON:-python3.12 python3.11}': set SFTRL_PYTHON"
}

mode="${1:-}"
case "$mode" in '' | --print | --check) ;; *) refuse "expected --print, --check or nothing, got '$mode'" ;; esac
pip=("$venv/bin/python" -m pip --disable-pip-version-check install)
if [ "$mode" != --check ]; then
  python="$(find_python)"
  [ -x "$venv/bin/python" ] || run "$python" -m venv "$venv"
  # crt and cccl: headers of CUDA, in the version that torch asks for, beside those that it brings.
  run "${pip[@]}" "$torch" 'cuda-toolkit[cccl,crt]'
  # What compiles Transformer Engine's extension: with --no-build-isolation it has to be here, and the extension is
  # made for the torch that is here. pip's own isolation would fetch the newest torch, and compile for that one.
  run "${pip[@]}" 'setuptools>=78.1.1,<81' wheel ninja pybind11 packaging
  export NVTE_BUILD_USE_NVIDIA_WHEELS=1
  run "${pip[@]}" --no-build-isolation "$torch" 'transformer-engine[pytorch]>=2.20,<3'
  run "${pip[@]}" --no-build-isolation "$torch" -e "$home[gpu,vllm,report]"
fi
run "$venv/bin/python" "$home/slurm/check_install.py"
