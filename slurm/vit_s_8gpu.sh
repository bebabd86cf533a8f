#!/usr/bin/env bash
# ViT-S/16 at 224 from scratch on ImageNet-1K: one node of 8 GPUs, 8 heads.
#
#   DATA=/data/imagenet sbatch slurm/vit_s_8gpu.sh [key=value ...]
#
# As slurm/vit_l_64gpu.sh in all else.
#SBATCH --job-name=vit_s_8gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

LTE_HOME=${LTE_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$LTE_HOME/slurm/lib.sh" ] || { echo "slurm: $LTE_HOME is not the repository: submit from there, or set LTE_HOME" >&2; exit 2; }
CONFIG=${CONFIG:-$LTE_HOME/configs/vit_s_8gpu.yaml}
. "$LTE_HOME/slurm/lib.sh"
train_job "$@"
