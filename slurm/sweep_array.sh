#!/usr/bin/env bash
# A sweep over one key as a job array, one value per task: merge intervals, or alpha.
#
#   DATA=/data/imagenet sbatch slurm/sweep_array.sh [key=value ...]
#   KEY=adapters.alpha VALUES="64 128 256" sbatch --array=0-2 slurm/sweep_array.sh
#
# Task i trains with the i-th of VALUES in RUN_DIR/KEY=VALUE; `lte-scale report RUN_DIR/*` compares them.
# As slurm/vit_s_8gpu.sh in all else.
#SBATCH --job-name=sweep
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail

LTE_HOME=${LTE_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$LTE_HOME/slurm/lib.sh" ] || { echo "slurm: $LTE_HOME is not the repository: submit from there, or set LTE_HOME" >&2; exit 2; }
CONFIG=${CONFIG:-$LTE_HOME/configs/vit_s_8gpu.yaml}
. "$LTE_HOME/slurm/lib.sh"

KEY=${KEY:-merge.every}
read -ra values <<<"${VALUES:-10 25 50 100}"
value=${values[$SLURM_ARRAY_TASK_ID]:-}
[ -n "$value" ] || refuse "VALUES: task $SLURM_ARRAY_TASK_ID of ${#values[@]} values; use sbatch --array=0-$((${#values[@]} - 1))"
RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID}/$KEY=$value
train_job "$KEY=$value" "$@"
