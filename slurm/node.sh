#!/usr/bin/env bash
# One node's part of a step of a job, started by slurm/lib.sh: node.sh preflight|train CONFIG [key=value ...]
set -euo pipefail

kind=$1
export NODE_RANK=$SLURM_NODEID

# The interface towards another node of the job. Left to themselves gloo takes the address of the host's own name, which
# on many systems is 127.0.1.1, and NCCL's bootstrap the first interface it finds. Data still goes over InfiniBand where
# there is any.
if [ "$NNODES" -gt 1 ]; then
    read -ra names <<<"$NODE_NAMES"
    peer=$(getent ahostsv4 "${names[$(((NODE_RANK + 1) % NNODES))]}" | awk 'NR == 1 {print $1}' || true)
    interface=$(ip -o route get "$peer" 2>/dev/null | sed -n 's/.* dev \(\S*\).*/\1/p' || true)
    if [ -n "$interface" ] && [ "$interface" != lo ]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
    fi
fi
# Without a limit every rank starts a thread per core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((SLURM_CPUS_ON_NODE + NPROC - 1) / NPROC))}
# Where NCCL cannot connect it says why.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A log is a file: what is said must be there when the job is killed.
export PYTHONUNBUFFERED=1

container=()
case ${CONTAINER:-} in *.sif)
    gpus=()
    [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=(--nv)
    container=(apptainer exec "${gpus[@]}" --bind "$MOUNTS" --pwd "$PWD" "$CONTAINER")
    ;;
esac

case $kind in
    preflight) command=(python -m lte_scale "$@") ;;
    train)
        if [ "$ENGINE" = deepspeed ]; then
            command=("$LTE_HOME/launchers/deepspeed.sh" --no_ssh --master_port "$MASTER_PORT" "$@")
        else
            command=("$LTE_HOME/launchers/torchrun.sh" "$@")
        fi
        ;;
esac

if [ -n "${DRY_RUN:-}" ]; then
    first=$((NODE_RANK * NPROC))
    echo "$SLURMD_NODENAME: ranks $first to $((first + NPROC - 1)) of $((NNODES * NPROC)), rendezvous $MASTER_ADDR:$MASTER_PORT," \
        "$OMP_NUM_THREADS threads each: ${container[*]} ${command[*]}"
    exit
fi

# USR1 is for the ranks, which save; launchers would die of it. Both signals end this node's part well, whatever the
# launcher makes of it: a code would have srun kill the ranks of other nodes, which may still be saving.
stopped=
trap 'stopped=1' USR1 TERM
(
    trap '' USR1
    exec "${container[@]}" "${command[@]}"
) &
code=0
while kill -0 $! 2>/dev/null; do
    code=0
    wait $! || code=$?
done
if [ -n "$stopped" ] && [ "$code" != 0 ]; then
    echo "$SLURMD_NODENAME" >"$STOP_MARK"
    code=0
fi
exit "$code"
