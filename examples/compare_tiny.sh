#!/usr/bin/env bash
# Which SFT leaves the best policy after RL, on two CPU cores: the quick start's sums, three seeds, five arms.
# Usage: bash examples/compare_tiny.sh [key=value ...]      key=value changes examples/compare_tiny.yaml
# Makes runs/compare_tiny: data, a base model, a writer that samples the demonstrations, and the comparison in out/,
# whose report is out/report.html. Started again it goes on where it was; remove runs/compare_tiny to begin again.
#   bash examples/compare_tiny.sh 'seeds=[0]' base.sft.train.steps=6 base.grpo.train.steps=4   # see every stage
set -euo pipefail
cd "$(dirname "$0")/.."
here=examples/quickstart
out=runs/compare_tiny

# train_base NAME KEY=VALUE...: a run of the quick start's base.yaml.
train_base() {
  python -m megatron_sftrl sft $here/base.yaml run_dir=$out/"$1" tokenizer.path=$out/data/tokenizer "${@:2}"
}

source tools/environment.sh report
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
export SFTRL_DEVICE=cpu
[ -e $out/data/prompts.jsonl ] || python $here/prepare.py $out/data
train_base base "data.train=[$out/data/base.jsonl]" train.steps=400 &
# The writer: a better model than the base, whose own samples are the demonstrations. Its log-probabilities are then
# those of the policy that wrote them, which is what PEAR's weights are ratios to.
train_base writer "data.train=[$out/data/demos.jsonl]" train.steps=300
wait $!
if [ ! -e $out/sampled.jsonl ]; then
  python -m megatron_sftrl generate $here/base.yaml run_dir=$out/writer tokenizer.path=$out/data/tokenizer \
    --prompts $out/data/demos.jsonl --out $out/sampled.jsonl --temperature 1 --max-new-tokens 48
fi
python - $out << 'PYTHON'
# Finished samples become demonstrations, right or wrong: to choose among them would be another distribution than the
# writer's. The last 256 are held out.
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
sampled = [json.loads(line) for line in (out / "sampled.jsonl").read_text().splitlines()]
rows = [{"prompt": row["prompt"], "response": row["responses"][0]} for row in sampled if row["is_finished"][0]]
for name, chosen in (("demonstrations", rows[:-256]), ("held_out", rows[-256:])):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
PYTHON
python -m megatron_sftrl compare examples/compare_tiny.yaml "$@"
