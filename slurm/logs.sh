# shellcheck shell=bash
# shellcheck disable=SC2154  # nodes, state and events_before are of slurm/lib.sh
# The job's log, one log per node, and which error came first.

say() { echo "slurm: $*"; }

note() {
    say "$*"
    record "$*"
}

# To the run's events.
record() {
    echo "$(date +%Y-%m-%dT%H:%M:%S.%3N%:z) slurm info job $SLURM_JOB_ID: $*" >>"$RUN_DIR/events.log"
}

refuse() {
    echo "slurm: $*" >&2
    exit 2
}

# Lines of `srun --label` ("3: text") to the log of each node, and to the job's log what a person wants to read there:
# not tracebacks nor the launchers' tables, which a failing job would print once per rank.
noise='^( |\[rank[0-9]+\]|\[?[WEIF][0-9]{4} |Traceback|\[20|\[[0-9]+\]:|={4}|-{4}|torch\.|frame #|<omitting|Exception raised|terminate called|Root Cause|Failures:|.*FAILED$|$|[A-Za-z_.]*(Error|Exception):|(\[node [0-9]+ rank [0-9]+\] )?error: on )'
split_logs() {
    trap '' TERM USR1 # they are for the ranks; these lines are still to come
    local line text node
    while IFS= read -r line; do
        if [[ $line =~ ^\ *([0-9]+):\ ?(.*)$ ]]; then
            node=${nodes[${BASH_REMATCH[1]}]} text=${BASH_REMATCH[2]}
            printf '%s\n' "$text" >>"$state/$SLURM_JOB_ID/$node.log"
            [[ $text =~ $noise ]] || printf '%s\n' "$text"
        elif [[ ! $line =~ ^srun:.*(got\ SIG|forcing|Exited\ with\ exit\ code|Killed|Terminating|Force\ Terminated|Terminated|step\ aborted) ]]; then
            printf '%s\n' "$line"
        fi
    done
}

# The lines of all nodes' logs, of the step that ran last, each after "NODE: ".
last_step_lines() {
    local node file
    for node in "${nodes[@]}"; do
        file=$state/$SLURM_JOB_ID/$node.log
        [ ! -f "$file" ] || awk -v node="$node" '/^==== attempt/ {text = ""; next} {text = text node ": " $0 "\n"}
            END {printf "%s", text}' "$file"
    done
}

# One line: the first error of the first rank that failed in the last step.
first_error() {
    local found
    # A rank that was killed cannot say so, and all others fail for its silence. Launchers say it, here in their tables.
    found=$(last_step_lines | awk '
        $2 == "rank" {rank = $4}
        $2 == "exitcode" && $4 ~ /^-/ && $4 != "-15" {print $1, "rank", rank, "was killed by signal", -$4; exit}
        / exits with return code = -[0-9]+$/ && $NF != "-15" {print $1, "a rank was killed by signal", -$NF; exit}')
    if [ -z "$found" ]; then # else what ranks have said, first what is not about the end of another
        found=$(tail -c "+$((events_before + 1))" "$RUN_DIR/events.log" 2>/dev/null | sort | awk '
            $2 != "rank" || $4 != "error" {next}
            {$1 = ""}
            !first {first = $0}
            !cause && !/onnection|NCCL|DistBackend|heartbeat|Broken pipe/ {cause = $0}
            END {print cause ? cause : first}' | sed 's/^ *//') || true
    fi
    if [ -z "$found" ] && [ -e "$STOP_MARK" ]; then
        found="$(cat "$STOP_MARK"): told to stop (SIGTERM), though the job was not"
    fi
    [ -n "$found" ] || found=$(last_step_lines | grep -E 'lte-scale: .|launchers/.*: .|(Error|Exception): .' | head -n 1) || true
    found=${found:-no rank has said why}
    echo "${found:0:300}"
}

preflight_reason() { last_step_lines | sed -n 's/^[^:]*: \(\(preflight\|lte-scale\): .*\)/\1/p' | tail -n 1; }
