#!/usr/bin/env bash
# GRPO on a 70B model: sbatch slurm/grpo_70b.sh [key=value ...], from the root of the repository; common.sh lists what
# else can be set. More nodes and another learning rate: sbatch --nodes=16 slurm/grpo_70b.sh optim.lr=5e-6
#SBATCH --job-name=grpo-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
home="${SFTRL_HOME:-${SLURM_SUBMIT_DIR:?start it with sbatch}}"
source "$home/slurm/common.sh" || exit 2
train grpo "${SFTRL_CONFIG:-$home/examples/grpo_70b.yaml}" "$@"
