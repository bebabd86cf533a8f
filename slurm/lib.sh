# shellcheck shell=bash
# What the job scripts share: from what Slurm granted to a run that is saved, requeued, resumed and ended.
#
#   train_job "$@"      the whole job; the arguments are overrides (key=value)
#
# By environment, each with a default:
#   CONFIG         the YAML file; the script's own
#   DATA           a folder or URL with train/ and val/, or training shards ('.../{000..099}.tar', DATA_VAL for validation)
#   RUN_DIR        the run: resumed if there is one; runs/JOB_NAME
#   ENGINE         fsdp (torchrun) or deepspeed (DeepSpeed's launcher); fsdp
#   CONTAINER      an image: by apptainer if it ends in .sif, else by pyxis; none
#   VENV           a virtual environment on all nodes; .venv of the repository if there is one
#   RANKS_PER_NODE default: the GPUs that Slurm granted in a node, else 1
#   REQUEUE_CODE   exit code that the site requeues; default: Slurm's RequeueExit; 0: by `scontrol requeue`
#   ON_NODE_LOSS   requeue, or shrink: go on without the lost node (needs sbatch --no-kill); requeue
#   DRY_RUN        1: say what every node would run, and end
set -euo pipefail

# shellcheck source=slurm/logs.sh
. "${BASH_SOURCE[0]%/*}/logs.sh"

train_job() {
    read_settings "$@"
    take_run_dir
    if [ -n "${DRY_RUN:-}" ]; then
        run_step train || true
        return
    fi
    say_attempt
    trap on_usr1 USR1
    trap 'stop=${stop:-TERM}' TERM
    run_step preflight || end_early "$?" "preflight failed: $(preflight_reason)" # it has said so itself
    end_if_stopped
    local before
    while true; do
        before=$(newest_checkpoint)
        if ! run_step train; then
            recover "$before"
        elif [ -n "$stop" ] || [ -e "$STOP_MARK" ]; then
            end_if_stopped
            end_early 143 "the step was ended by a signal that the job did not get; newest: $(newest_checkpoint)"
        else
            note "the run is whole"
            remember "it was whole"
            return
        fi
    done
}

# After a training step that failed: returns where training can go on in this allocation.
recover() { # CHECKPOINT, the newest at the start of that step
    end_if_stopped
    local failure lost
    failure=$(first_error)
    lost=$(lost_nodes)
    # A node may be gone without Slurm's knowing it yet. Preflight tells a bad node from a bad program.
    if [ -z "$lost" ] && ! run_step preflight; then
        end_if_stopped
        lost=$(wait_for_lost_nodes)
        [ -n "$lost" ] || requeue "a node does not pass preflight any more ($(preflight_reason))"
    elif [ -z "$lost" ] && [ "$(newest_checkpoint)" = "$1" ]; then
        end_early 1 "failed, and nothing was saved since the start before" "$failure"
    fi
    if [ -n "$lost" ]; then
        note "lost: $lost ($failure)"
        without "$lost" || requeue "lost: $lost"
        run_step preflight || { end_if_stopped; requeue "the other nodes do not pass preflight ($(preflight_reason))"; }
    fi
    note "restarts on ${nodes[*]} from $(newest_checkpoint) after: $failure"
}

read_settings() {
    local word
    [ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a Slurm job script: sbatch $0"
    CONFIG=${CONFIG:?}
    [ -f "$CONFIG" ] || refuse "CONFIG: $CONFIG: no such file; give the path of a YAML file, as $LTE_HOME/configs/*.yaml"
    ENGINE=${ENGINE:-fsdp}
    case $ENGINE in fsdp | deepspeed) ;; *) refuse "ENGINE: '$ENGINE' is none; use fsdp or deepspeed" ;; esac
    case ${CONTAINER:-} in
        '') ;;
        *.sif) [ -f "$CONTAINER" ] || refuse "CONTAINER: $CONTAINER: no such file; give the path of an image" ;;
        *) srun --help | grep -q -e --container-image || refuse "CONTAINER: '$CONTAINER' needs pyxis, which this Slurm lacks; use a .sif, which apptainer runs" ;;
    esac
    RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME}
    overrides=()
    case ${DATA:-} in
        '') ;;
        *.tar*) overrides+=("data.train=$DATA" "data.val=${DATA_VAL:-}") ;;
        *) overrides+=("data.train=${DATA%/}/train" "data.val=${DATA%/}/val") ;;
    esac
    for word in "$@"; do
        case $word in
            run_dir=*) RUN_DIR=${word#run_dir=} ;;
            *=*) overrides+=("$word") ;;
            *) refuse "'$word' is no override; write key=value, as merge.every=50" ;;
        esac
    done
    case $RUN_DIR in /*) ;; *) RUN_DIR=$PWD/$RUN_DIR ;; esac
    overrides+=("run_dir=$RUN_DIR")
    [ "$ENGINE" = fsdp ] || overrides+=("engine.name=$ENGINE")

    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    NPROC=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    # Two jobs may share a node; ports below those that the kernel hands out.
    first_port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 2000 * 10))}
    attempt=${SLURM_RESTART_COUNT:-0} steps=0 stop=
    VENV=${VENV:-$LTE_HOME/.venv}
    # A container brings its own.
    [ -n "${CONTAINER:-}" ] || [ ! -x "$VENV/bin/python" ] || PATH=$VENV/bin:$PATH
    export LTE_HOME CONFIG ENGINE RUN_DIR NPROC PATH CONTAINER="${CONTAINER:-}" MOUNTS
    MOUNTS=$(mounts)
}

# One job at a time in a run directory: two would write over one another's checkpoints.
take_run_dir() {
    state=$RUN_DIR/slurm
    mkdir -p "$state/$SLURM_JOB_ID" 2>/dev/null || refuse "RUN_DIR: cannot write $RUN_DIR; name another directory"
    [ -z "${DRY_RUN:-}" ] || return 0
    local other
    other=$(cat "$state/job" 2>/dev/null || true)
    if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ] && [ -n "$(squeue -h -j "$other" -t R,CG 2>/dev/null)" ]; then
        refuse "RUN_DIR: job $other is running in $RUN_DIR; name another directory, or wait for it (sbatch -d afterany:$other)"
    fi
    echo "$SLURM_JOB_ID" >"$state/job"
}

say_attempt() {
    say "job $SLURM_JOB_ID on ${nodes[*]}: ${#nodes[@]} nodes x $NPROC ranks, engine $ENGINE, $CONFIG, logs in $state/$SLURM_JOB_ID"
    local ended
    ended=$(cat "$state/ended" 2>/dev/null || true)
    if [ -n "$ended" ]; then
        note "attempt $attempt, from $(newest_checkpoint); the one before: $ended"
    fi
    # What the next attempt reads if this one cannot tell it any more.
    remember "it ended without a word on ${nodes[*]}, as when a node is lost"
}

remember() { echo "$*" >"$state/ended"; }

newest_checkpoint() {
    local newest
    newest=$(find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*[0-9]' 2>/dev/null | sort | tail -n 1) || true
    newest=${newest##*/}
    echo "${newest:-no checkpoint}"
}

# ---------------------------------------------------------------------------------------------------- ends

# Of the time limit and of preemption. Ranks that are still starting do not hear it, so it is said again.
on_usr1() {
    [ -z "$stop" ] || return 0
    stop=USR1
    say "USR1: the time is nearly over, or another job needs the nodes; the ranks save and end"
    while scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null; do sleep 10; done &
    repeating=$!
}

end_if_stopped() {
    case $stop in
        USR1)
            kill "$repeating" 2>/dev/null || true
            requeue "stopped by USR1 (time limit or preemption), saved as $(newest_checkpoint)"
            ;;
        TERM)
            local lost
            lost=$(lost_nodes)
            note "stopped by SIGTERM${lost:+, lost: $lost}; newest: $(newest_checkpoint)"
            remember "it was stopped by SIGTERM${lost:+, lost: $lost}"
            exit 143
            ;;
    esac
}

requeue() { # REASON; does not return
    note "$1; requeued, and resumes by itself"
    remember "$1"
    local code=${REQUEUE_CODE:-}
    [ -n "$code" ] || code=$(scontrol show config | sed -n 's/^RequeueExit *= *\([0-9]*\).*/\1/p')
    [ "${code:-0}" = 0 ] || exit "$code"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        note "this site does not let the job requeue itself; the same sbatch command resumes"
        exit 1
    fi
    exit 0
}

end_early() { # CODE REASON [FIRST ERROR]; does not return
    end_if_stopped
    record "$2${3:+: $3}"
    remember "$2${3:+: $3}"
    if [ -n "${3:-}" ]; then # the last word is the error's
        say "$2; logs in $state/$SLURM_JOB_ID"
        say "first error: $3"
    fi
    exit "$1"
}

lost_nodes() { # of those in use, by Slurm's word: down, or (*) not answering
    local names
    names=$(IFS=, && echo "${nodes[*]}")
    sinfo -h -N -n "$names" -o '%N %T' | awk '$2 ~ /down|\*/ {print $1}' | sort -u | paste -sd' '
}

# Slurm takes its time to see that a node is gone (SlurmdTimeout, 300 s by default). To requeue, nobody need wait for it.
wait_for_lost_nodes() {
    local lost until=$((SECONDS + ${LOSS_SECONDS:-330}))
    lost=$(lost_nodes)
    while [ "${ON_NODE_LOSS:-requeue}" = shrink ] && [ -z "$lost$stop" ] && [ "$SECONDS" -lt "$until" ]; do
        sleep 2
        lost=$(lost_nodes)
    done
    echo "$lost"
}

without() { # NODES: go on with the others, if so configured
    [ "${ON_NODE_LOSS:-requeue}" = shrink ] || return 1
    local node left=()
    for node in "${nodes[@]}"; do
        [[ " $1 " == *" $node "* ]] || left+=("$node")
    done
    [ "${#left[@]}" -gt 0 ] || return 1
    nodes=("${left[@]}")
}

# ---------------------------------------------------------------------------------------------------- steps

run_step() { # preflight|train; the exit code of the first node that failed
    local kind=$1 count=${#nodes[@]}
    # shellcheck disable=SC2034  # for logs.sh
    events_before=$(stat -c %s "$RUN_DIR/events.log" 2>/dev/null || echo 0)
    steps=$((steps + 1))
    # A port of its own for every step: the one before may still hold its own.
    export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((first_port + steps % 10)) NNODES=$count NODE_NAMES="${nodes[*]}"
    export RDZV_ID=$SLURM_JOB_ID.$attempt.$steps HOSTFILE=$state/$SLURM_JOB_ID/hostfile
    export STOP_MARK=$state/$SLURM_JOB_ID/stopped
    rm -f "$STOP_MARK"
    printf "%s slots=$NPROC\n" "${nodes[@]}" >"$HOSTFILE"
    local node
    for node in "${nodes[@]}"; do
        echo "==== attempt $attempt, $kind, $(date +%FT%T)" >>"$state/$SLURM_JOB_ID/$node.log"
    done
    local names
    names=$(IFS=, && echo "${nodes[*]}")
    # All cores of a node for its one task: srun does not take --cpus-per-task over from sbatch.
    local srun=(srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --nodelist="$names"
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" --label)
    # A node that fails ends the others at once, where they would wait for it; preflight is to hear all of them.
    [ "$kind" = preflight ] || srun+=(--kill-on-bad-exit=1)
    # On a lost node the step before is never over.
    [ "$count" = "$SLURM_JOB_NUM_NODES" ] || srun+=(--overlap)
    case ${CONTAINER:-} in
        '' | *.sif) ;;
        *) srun+=(--container-image="$CONTAINER" --container-workdir="$PWD" --container-mounts="$MOUNTS") ;;
    esac
    # srun must not die of what is meant for the ranks: it would kill them.
    (
        trap '' TERM USR1
        "${srun[@]}" bash "$LTE_HOME/slurm/node.sh" "$kind" "$CONFIG" "${overrides[@]}" 2>&1 </dev/null | split_logs
    ) &
    await $!
}

# Its exit code, whatever signals come meanwhile.
await() {
    local code=0 again=0
    while kill -0 "$1" 2>/dev/null; do
        code=0
        wait "$1" || code=$?
    done
    wait "$1" 2>/dev/null || again=$?
    [ "$again" = 127 ] || code=$again # 127: told already
    return "$code"
}

# What a container must see.
mounts() {
    local path found=("$PWD" "$LTE_HOME" "$RUN_DIR" "$(dirname "$(readlink -f "$CONFIG")")")
    [ ! -d "${DATA:-}" ] || found+=("$(readlink -f "$DATA")")
    printf '%s\n' "${found[@]}" | sort -u | while read -r path; do echo "$path:$path"; done | paste -sd,
}
