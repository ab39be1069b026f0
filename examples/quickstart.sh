#!/usr/bin/env bash
# From nothing to a model trained with rewards on two CPU cores: a base model, GIFT under tensor parallelism,
# GRPO from there with the same task's verifier, and the result in transformers.
# Usage: bash examples/quickstart.sh                        QUICKSTART_SEED=1 for other problems and other weights,
#                                                           QUICKSTART_STEPS=20 to see the stages with so few steps of
#                                                           SFT, on a part of the data, that rewards do not rise
#        bash examples/quickstart.sh grpo optim.lr=3e-4     GRPO again and what follows, with changed keys
# Everything it makes is in .venv and runs/quickstart; the latter is emptied first, or what GRPO made of it.
set -euo pipefail
cd "$(dirname "$0")/.."
here=examples/quickstart
out=runs/quickstart
seed="${QUICKSTART_SEED:-0}"
what="${1:-all}"
changes=("${@:2}")
few=(${QUICKSTART_STEPS:+train.steps="$QUICKSTART_STEPS"})
part=(${QUICKSTART_STEPS:+--share 0.1})

prepare_for_rewards() {
  stage "data and tokenizer"  python $here/prepare.py $out/data --seed "$seed" "${part[@]}"
  stage "base model, dp 2"    train sft base "${few[@]}"
  stage "answers of base"     answer base
  stage "GIFT, tp 2"          train sft gift "${few[@]}"
  stage "answers of GIFT"     answer gift
}

train_with_rewards() {
  stage "GRPO, dp 2"          train grpo grpo "${changes[@]}"
  stage "answers of GRPO"     answer grpo
  stage "to transformers"     export_and_ask grpo
}

# train COMMAND NAME KEY=VALUE...: two processes; how they share the work stands under `parallel` in NAME.yaml.
train() {
  torchrun --standalone --nproc-per-node 2 -m megatron_sftrl "$1" $here/"$2".yaml seed="$seed" "${@:3}"
}

# answer NAME: responses of a stage to the held-out problems. One process each, so that greedy and sampled
# responses are made side by side; a checkpoint does not mind another layout.
answer() {
  generate "$1" greedy --temperature 0 &
  generate "$1" sampled --temperature 1 --num-samples 4
  wait $!
}

# generate NAME HOW OPTIONS...
generate() {
  sftrl generate $here/"$1".yaml parallel.tp=1 --checkpoint $out/"$1" --prompts $out/data/prompts.jsonl \
    --out $out/answers/"$1"/"$2".jsonl --max-new-tokens 48 --seed "$seed" "${@:3}"
}

# export_and_ask NAME: what transformers loads, compared with the checkpoint it came from.
export_and_ask() {
  python tools/megatron_to_hf.py --checkpoint $out/"$1" --out $out/hf --verify
  python $here/ask.py $out/hf $out/answers/"$1"/greedy.jsonl
}

# stage TITLE COMMAND ARGUMENTS...: run it, and note how long it took.
stage() {
  local title=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$title"
  "$@"
  printf '%s\t%d\n' "$title" $((SECONDS - start)) >> $out/times.tsv
}

source tools/environment.sh report
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
export SFTRL_DEVICE=cpu  # two processes, also on a machine with a single GPU
case "$what" in
  all)
    rm -rf $out
    mkdir -p $out
    prepare_for_rewards
    cp $out/times.tsv $out/times_until_grpo.tsv
    ;;
  grpo)
    if [ ! -e $out/times_until_grpo.tsv ]; then
      echo "error: $out holds no complete GIFT run; run bash examples/quickstart.sh first" >&2
      exit 2
    fi
    rm -rf $out/grpo $out/answers/grpo $out/hf
    cp $out/times_until_grpo.tsv $out/times.tsv
    ;;
  *)
    echo "error: expected nothing or 'grpo' and keys of $here/grpo.yaml, got '$what'" >&2
    exit 2
    ;;
esac
train_with_rewards
python $here/report.py $out base gift grpo
