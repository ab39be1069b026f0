#!/usr/bin/env bash
# Behaviour log-probabilities for PEAR, with any checkpoint:
#   sbatch slurm/score_behavior.sh examples/pear_70b.yaml --checkpoint DIR --data train.jsonl --out scored.jsonl
#SBATCH --job-name=score-behavior
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
home="${SFTRL_HOME:-${SLURM_SUBMIT_DIR:?start it with sbatch}}"
source "$home/slurm/common.sh" || exit 2
run_tool score_behavior_logprobs.py "$@"
