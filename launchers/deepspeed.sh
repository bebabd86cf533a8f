#!/usr/bin/env bash
# Start a job with DeepSpeed's launcher on the nodes of a hostfile, from any machine that can ssh to them:
#
#   launchers/deepspeed.sh --hostfile HOSTFILE train CONFIG [key=value ...]
#
# Without ssh between the nodes, on every node with its own number:
#
#   NODE_RANK=0 MASTER_ADDR=node1 launchers/deepspeed.sh --no_ssh --hostfile HOSTFILE train CONFIG [key=value ...]
#
# HOSTFILE, NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment stand for the options of these names.
# docs/deepspeed.md has the rest.
set -euo pipefail

# A collective that hangs leaves a trace of what each rank was waiting for.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}

exec python "$(dirname "$(readlink -f "$0")")/deepspeed_job.py" "$@"
