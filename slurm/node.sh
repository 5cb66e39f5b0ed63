#!/usr/bin/env bash
# Runs once on each node of the job: determines the node's rank and starts its launcher. launch.sh starts it by srun.
#
#   node.sh SCRIPT [FLAGS]     with NODES, PROCESSES (of a node), HOST, PORT, ENGINE and LOGS from launch.sh
set -u -o pipefail
cd "${ISOTUNE_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
files=${ISOTUNE_FILES:+$ISOTUNE_FILES/} # as in launch.sh
# shellcheck source=slurm/environment.sh
. "${files}slurm/environment.sh"

# Every process of a task receives TERM and USR1. The ranks handle them: they write a checkpoint and exit. The launcher
# must ignore them, or it would kill the ranks after 30 s. It inherits the ignored signals from here, and the variables
# keep it from forwarding them.
trap '' TERM USR1
export PET_SIGNALS_TO_HANDLE=SIGHUP TORCHELASTIC_SIGNALS_TO_HANDLE=SIGHUP

# SLURM_NODEID must be expanded on the node: in the batch script it is always 0.
rank=$SLURM_NODEID
name=$(hostname -s)
log=$LOGS/attempt-${SLURM_RESTART_COUNT:-0}-$name.log

if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ -z "${PROCESSES_PER_NODE:-}" ] && [ "$SLURM_GPUS_ON_NODE" != "$PROCESSES" ]; then
    echo "$name has $SLURM_GPUS_ON_NODE GPUs and the first node $PROCESSES: ask with --gpus-per-node, not --gpus" >&2
    exit 2
fi

# Threads per rank: an equal share of the node's CPUs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1))}

# Caches on the node's local disk; the first rank of a node fills them.
if [ -n "${NODE_CACHE:-}" ]; then
    export ISOTUNE_CACHE=$NODE_CACHE/isotune HF_HOME=${HF_HOME:-$NODE_CACHE/huggingface}
    export TORCH_EXTENSIONS_DIR=$NODE_CACHE/torch_extensions TRITON_CACHE_DIR=$NODE_CACHE/triton
    mkdir -p "$NODE_CACHE" || exit 2
fi

# A launcher that cannot connect to the first node would wait ten minutes without naming it.
reach_first_node() {
    local error deadline=$((SECONDS + ${MEETING_SECONDS:-120}))
    while [ "$SECONDS" -lt "$deadline" ]; do
        error=$(timeout 5 bash -c ": </dev/tcp/$HOST/$PORT" 2>&1) && return
        [[ $error == *refused* ]] && return # the host is reachable, and its launcher still starts
        sleep 1
    done
    echo "error: $name ($(hostname -I 2>/dev/null)) cannot reach the first node $HOST" \
        "($(getent hosts "$HOST" | cut -d' ' -f1)), port $PORT: $error" >&2
    return 1
}

rendezvous=()
if [ "$NODES" -gt 1 ]; then
    if [ "$rank" -gt 0 ]; then reach_first_node || exit 1; fi
    rendezvous=(--rdzv_backend static --main_process_ip "$HOST")
fi

in_environment accelerate launch --config_file "${files}accelerate_configs/$ENGINE.yaml" \
    --num_processes $((NODES * PROCESSES)) --num_machines "$NODES" --machine_rank "$rank" \
    "${rendezvous[@]}" --main_process_port "$PORT" "$@" 2>&1 | tee -a "$log"
