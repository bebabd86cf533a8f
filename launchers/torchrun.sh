#!/usr/bin/env bash
# Start this node's ranks with torchrun. On every node, with its own NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launchers/torchrun.sh train CONFIG [key=value ...]
#
# NPROC: ranks on this node (default: its GPUs, else 1). MASTER_PORT: default 29500.
# RDZV_ID, a name for the job: nodes then find their numbers themselves, by a c10d rendezvous at MASTER_ADDR.
set -euo pipefail

nnodes=${NNODES:-1}
if [ -z "${NPROC:-}" ]; then
    NPROC=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
    [ "$NPROC" -gt 0 ] || NPROC=1
fi
# Left unset, every rank would start a thread per core, and data workers with them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / NPROC > 0 ? $(nproc) / NPROC : 1 ))}
# A collective that hangs leaves a trace of what each rank was waiting for.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}

if [ "$nnodes" -eq 1 ]; then
    exec torchrun --standalone --nproc-per-node "$NPROC" -m lte_scale "$@"
fi
if [ -n "${RDZV_ID:-}" ]; then
    meet=(--rdzv-backend c10d --rdzv-id "$RDZV_ID" --rdzv-endpoint "${MASTER_ADDR:?host name of node 0}:${MASTER_PORT:-29500}")
else
    meet=(--node-rank "${NODE_RANK:?number of this node, from 0}" --master-addr "${MASTER_ADDR:?host name of node 0}"
        --master-port "${MASTER_PORT:-29500}")
fi
exec torchrun --nnodes "$nnodes" --nproc-per-node "$NPROC" "${meet[@]}" -m lte_scale "$@"
