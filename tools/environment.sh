#!/usr/bin/env bash
# Makes the virtual environment that the quick start and the tests share; does nothing when it is up to date.
# Usage: source tools/environment.sh [extras]   e.g. source tools/environment.sh test
# SFTRL_VENV (default .venv), SFTRL_PYTHON and SFTRL_TORCH (default torch==2.13.0) can be set.
_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="${SFTRL_VENV:-$_root/.venv}"
_extras="${1:-}"
case ",$_extras," in
  *,gpu,* | *,vllm,*)
    # They are compiled for one torch, which takes more than an extra's name.
    echo "error: bash slurm/install.sh installs Transformer Engine and vLLM" >&2
    exit 2
    ;;
esac
_python="${SFTRL_PYTHON:-}"
if [ -z "$_python" ]; then
  for _candidate in python3.11 python3.12 python3.13 python3; do
    if "$_candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
      _python="$_candidate"
      break
    fi
  done
fi
if [ -z "$_python" ]; then
  echo "error: no Python 3.11 or newer found; set SFTRL_PYTHON" >&2
  exit 1
fi
_stamp="$_venv/.installed-${_extras:-core}"
_serving=("$_stamp")
[ "$_extras" != report ] || _serving+=("$_venv/.installed-test")  # the tests' environment holds it as well
# The checkout is part of it: an editable install points at one folder, and a shared environment may be asked
# for by several.
_want="$_root $(cat "$_root/setup.py" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16)"
if ! grep -qsFx "$_want" "${_serving[@]}"; then
  echo "installing into $_venv ($("$_python" --version))"
  rm -f "$_venv"/.installed-*
  "$_python" -m venv "$_venv"
  # torch first and pinned: left to the resolver it would come with another build's CUDA packages.
  # Most of 26,000 files are never imported: each is compiled by the first process that does.
  _pip=("$_venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
  "${_pip[@]}" "${SFTRL_TORCH:-torch==2.13.0}"
  "${_pip[@]}" -e "$_root${_extras:+[$_extras]}"
  echo "$_want" | tee "$_venv/.installed-core" > "$_stamp"
fi
export PATH="$_venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE  # or every process would compile
