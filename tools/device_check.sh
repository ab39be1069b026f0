#!/usr/bin/env bash
# The first minutes on a borrowed GPU, on a machine without network: tools/device_check.py says what is checked.
#
#     bash tools/device_check.sh fetch 3.12     # here, in our environment: wheels for that Python, into .wheels/
#     bash tools/device_check.sh [options]      # there, with .wheels/ beside the code; torch is the machine's own
#
# Transformer Engine and vLLM are too large to be carried; what needs them is skipped and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=.wheels

# What torch does not bring. In the versions of this environment, except that each Python has a newest megatron-core
# of its own, and that the kernels of others are not installed here.
packages=(annotated-types antlr4-python3-runtime anyio certifi h11 httpcore httpx huggingface_hub idna iniconfig
  latex2sympy2_extended markdown-it-py math-verify mdurl packaging pluggy psutil pydantic pydantic_core Pygments
  pytest pytest-timeout PyYAML reasoning-gym regex rich safetensors sentencepiece tokenizers tqdm transformers typer
  typing-inspection)
newest=(megatron-core cut-cross-entropy liger-kernel)

fetch() {
  local platforms=() glibc pinned=()
  for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
  mapfile -t pinned < <(python -m pip list --format=freeze --disable-pip-version-check |
    grep -iE "^($(IFS='|'; echo "${packages[*]//[-_]/[-_]}"))==")
  if [ "${#pinned[@]}" -ne "${#packages[@]}" ]; then
    echo "error: expected ${#packages[@]} packages in this environment, found ${#pinned[@]}: ${pinned[*]}" >&2
    exit 1
  fi
  rm -rf "$wheels"
  # Without what they ask for: torch, and what these checks do not use.
  python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$1" \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 -d "$wheels" "${pinned[@]}" "${newest[@]}"
  du -sh "$wheels"
}

if [ "${1:-}" = fetch ]; then
  fetch "${2:?expected the Python of that machine, such as 3.12}"
  exit
fi
if compgen -G "$wheels/*.whl" > /dev/null; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" \
    "$wheels"/*.whl
  export PYTHONPATH="$site"
fi
python3 -m tools.device_check "$@"
