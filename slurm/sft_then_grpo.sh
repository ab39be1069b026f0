#!/usr/bin/env bash
# SFT, its export to Hugging Face, and GRPO from that model, each when the one before has succeeded. On a login node:
#   bash slurm/sft_then_grpo.sh RUNS [key=value ...] -- [key=value ...]
# RUNS is a directory that all nodes share: the runs are RUNS/sft and RUNS/grpo, the model between them RUNS/hf.
# Keys before -- are for SFT, those behind it for GRPO. What can be set, besides what common.sh lists:
#   SFTRL_SFT, SFTRL_GRPO                  job scripts (slurm/gift_70b.sh, slurm/grpo_70b.sh)
#   SFTRL_SFT_CONFIG, SFTRL_GRPO_CONFIG    their YAML files (examples/gift_70b.yaml, examples/grpo_70b.yaml)
#   SFTRL_SBATCH, SFTRL_CONVERT_SBATCH     options of sbatch for the two trainings, and for the export
set -euo pipefail
export SFTRL_HOME="${SFTRL_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
export PYTHONPATH="$SFTRL_HOME${PYTHONPATH:+:$PYTHONPATH}"
[ ! -d "$SFTRL_HOME/.venv/bin" ] || export PATH="$SFTRL_HOME/.venv/bin:$PATH"
scripts=$SFTRL_HOME/slurm

mkdir -p "${1:?expected: sft_then_grpo.sh RUNS [key=value ...] -- [key=value ...]}"
runs=$(cd "$1" && pwd)
shift
sft=("run_dir=$runs/sft")
# Weights, sizes and tokenizer are those of the export, whatever the YAML file names.
grpo=("run_dir=$runs/grpo" model.hf_config=null model.architecture=null model.init_checkpoint=null
  "model.hf=$runs/hf" "tokenizer.path=$runs/hf")
while [ $# -gt 0 ] && [ "$1" != -- ]; do sft+=("$1"); shift; done
grpo+=("${@:2}")
sft_config=${SFTRL_SFT_CONFIG:-$SFTRL_HOME/examples/gift_70b.yaml}
grpo_config=${SFTRL_GRPO_CONFIG:-$SFTRL_HOME/examples/grpo_70b.yaml}

# Now: GRPO's turn to be refused would come when SFT is done.
"${SFTRL_PYTHON:-python}" "$scripts/read_config.py" sft "$sft_config" "${sft[@]}" > /dev/null
"${SFTRL_PYTHON:-python}" "$scripts/read_config.py" grpo "$grpo_config" "${grpo[@]}" > /dev/null

# submit OPTIONS SCRIPT ARGUMENT...: the job's number.
submit() {
  # shellcheck disable=SC2086  # the options are words
  sbatch --parsable $1 "${@:2}" | cut -d';' -f1
}
after="--kill-on-invalid-dep=yes --dependency=afterok"  # what can never begin leaves the queue
first=$(SFTRL_CONFIG=$sft_config submit "${SFTRL_SBATCH:-}" "${SFTRL_SFT:-$scripts/gift_70b.sh}" "${sft[@]}")
second=$(submit "$after:$first ${SFTRL_CONVERT_SBATCH:-}" "$scripts/convert.sh" to_hf \
  --checkpoint "$runs/sft" --out "$runs/hf")
third=$(SFTRL_CONFIG=$grpo_config submit "$after:$second ${SFTRL_SBATCH:-}" \
  "${SFTRL_GRPO:-$scripts/grpo_70b.sh}" "${grpo[@]}")
echo "$first $second $third"
