#!/usr/bin/env bash
# ViT-L/16 at 224 from scratch on ImageNet-1K: 8 nodes of 8 GPUs, 64 heads.
#
#   DATA=/data/imagenet sbatch slurm/vit_l_64gpu.sh [key=value ...]
#
# DATA holds train/ and val/ (`lte-scale shards`). Any #SBATCH line can be overridden: sbatch --nodes=2 --time=4:00:00 ...
# CONFIG, DATA, RUN_DIR, ENGINE, CONTAINER and more by environment: slurm/lib.sh. docs/slurm.md says what happens when.
#SBATCH --job-name=vit_l_64gpu
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Slurm runs a copy of this file: the repository is where it was submitted.
LTE_HOME=${LTE_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$LTE_HOME/slurm/lib.sh" ] || { echo "slurm: $LTE_HOME is not the repository: submit from there, or set LTE_HOME" >&2; exit 2; }
CONFIG=${CONFIG:-$LTE_HOME/configs/vit_l_64gpu.yaml}
. "$LTE_HOME/slurm/lib.sh"
train_job "$@"
