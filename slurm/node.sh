#!/usr/bin/env bash
# Runs on each node of the job, once, started by launch.sh through srun: finds the node's place and starts its launcher.
#
#   node.sh SCRIPT [FLAGS]     with NODES, PROCESSES (of a node), HOST, PORT, ENGINE and LOGS from launch.sh
set -u -o pipefail
cd "${ISOTUNE_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
. slurm/environment.sh

# TERM and USR1 come to every process of a task. The ranks take them for themselves, checkpoint and end; the launcher
# must not: it would end them after 30 s, however much they still have to write. What is ignored here, it ignores too,
# and it is told to forward neither.
trap '' TERM USR1
export PET_SIGNALS_TO_HANDLE=SIGHUP TORCHELASTIC_SIGNALS_TO_HANDLE=SIGHUP

# The place of this node is known on this node: expanded in the batch script it would be 0 everywhere.
rank=$SLURM_NODEID
name=$(hostname -s)
log=$LOGS/life-${SLURM_RESTART_COUNT:-0}-$name.log

if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ -z "${PROCESSES_PER_NODE:-}" ] && [ "$SLURM_GPUS_ON_NODE" != "$PROCESSES" ]; then
    echo "$name has $SLURM_GPUS_ON_NODE GPUs and the first node $PROCESSES: ask with --gpus-per-node, not --gpus" >&2
    exit 2
fi

# Threads of a rank: its share of the node's CPUs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1))}

# Caches on the node's own disk, where it is named: filled once a node, by whichever rank comes first.
if [ -n "${NODE_CACHE:-}" ]; then
    export ISOTUNE_CACHE=$NODE_CACHE/isotune HF_HOME=${HF_HOME:-$NODE_CACHE/huggingface}
    export TORCH_EXTENSIONS_DIR=$NODE_CACHE/torch_extensions TRITON_CACHE_DIR=$NODE_CACHE/triton
    mkdir -p "$NODE_CACHE" || exit 2
fi

# A launcher whose first node is out of reach would wait ten minutes and not say for whom.
reach_first_node() {
    local said deadline=$((SECONDS + ${MEETING_SECONDS:-60}))
    while [ "$SECONDS" -lt "$deadline" ]; do
        said=$(timeout 5 bash -c ": </dev/tcp/$HOST/$PORT" 2>&1) && return
        [[ $said == *refused* ]] && return # it is there, and its launcher will be
        sleep 1
    done
    echo "error: $name ($(hostname -I 2>/dev/null)) cannot reach the first node $HOST" \
        "($(getent hosts "$HOST" | cut -d' ' -f1)), port $PORT: $said" >&2
    return 1
}

meeting=()
if [ "$NODES" -gt 1 ]; then
    if [ "$rank" -gt 0 ]; then reach_first_node || exit 1; fi
    meeting=(--rdzv_backend static --main_process_ip "$HOST")
fi

in_environment accelerate launch --config_file "accelerate_configs/$ENGINE.yaml" \
    --num_processes $((NODES * PROCESSES)) --num_machines "$NODES" --machine_rank "$rank" \
    "${meeting[@]}" --main_process_port "$PORT" "$@" 2>&1 | tee -a "$log"
