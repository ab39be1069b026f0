#!/usr/bin/env bash
# From nothing to a fine-tuned model on two CPU cores: a base model, then GIFT under tensor parallelism.
# Usage: bash examples/quickstart.sh        QUICKSTART_SEED=1 for other problems and other weights
# Everything it makes is in .venv and runs/quickstart; the latter is made anew each time.
set -euo pipefail
cd "$(dirname "$0")/.."
here=examples/quickstart
out=runs/quickstart
seed="${QUICKSTART_SEED:-0}"

stages() {
  stage "data and tokenizer"  python $here/prepare.py $out/data --seed "$seed"
  stage "base model, dp 2"    train base
  stage "answers of base"     answer base
  stage "GIFT, tp 2"          train gift
  stage "answers of GIFT"     answer gift
}

# train NAME: two processes; how they share the work stands under `parallel` in NAME.yaml.
train() {
  torchrun --standalone --nproc-per-node 2 -m megatron_sftrl sft $here/$1.yaml seed="$seed"
}

# answer NAME: responses of every checkpoint of a stage to the held-out problems. One process each, so that
# greedy and sampled responses are made side by side; a checkpoint does not mind another layout.
answer() {
  local checkpoint answers
  for checkpoint in $out/$1/checkpoints/step-*; do
    answers=$out/answers/$1/$(basename "$checkpoint")
    generate "$1" "$checkpoint" "$answers/greedy.jsonl" 0 &
    generate "$1" "$checkpoint" "$answers/sampled.jsonl" 1
    wait $!
  done
}

# generate NAME CHECKPOINT OUT TEMPERATURE
generate() {
  sftrl generate $here/$1.yaml parallel.tp=1 --checkpoint "$2" --prompts $out/data/prompts.jsonl \
    --out "$3" --temperature "$4" --max-new-tokens 48 --seed "$seed"
}

# stage TITLE COMMAND ARGUMENTS...: run it, and note how long it took.
stage() {
  local title=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$title"
  "$@"
  printf '%s\t%d\n' "$title" $((SECONDS - start)) >> $out/times.tsv
}

source tools/environment.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
export CUDA_VISIBLE_DEVICES=  # two processes on the CPU, also on a machine with a single GPU
rm -rf $out
mkdir -p $out
stages
python $here/report.py $out base gift
