#!/usr/bin/env bash
# Between Hugging Face and Megatron: sbatch slurm/convert.sh to_hf --checkpoint runs/my-run --out DIR [--verify]
#                                    sbatch slurm/convert.sh from_hf --hf DIR --out DIR [--verify]
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
export SFTRL_PROCESSES="${SFTRL_PROCESSES:-4}"  # they share the files; no GPU is needed
home="${SFTRL_HOME:-${SLURM_SUBMIT_DIR:?start it with sbatch}}"
source "$home/slurm/common.sh" || exit 2
case "${1:-}" in
  to_hf) run_tool megatron_to_hf.py "${@:2}" ;;
  from_hf) run_tool hf_to_megatron.py "${@:2}" ;;
  *) refuse "expected to_hf or from_hf, got '${1:-}'" ;;
esac
