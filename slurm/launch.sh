# shellcheck shell=bash
# Sourced by the batch scripts. `launch SCRIPT [FLAGS]` runs a script of this checkout on every node of the job and
# handles time limits, preemptions and lost nodes. It returns when the script has finished; otherwise it ends the job.
# See docs/slurm.md.
#
# Variables to set before sbatch, all optional (see also environment.sh):
#   ENGINE              a file in accelerate_configs/; default: single for one process, otherwise ddp
#   PROCESSES_PER_NODE  default: the number of GPUs of a node, or --ntasks-per-node without GPUs
#   MAX_RESTARTS        how often a job may be requeued (100)
#   LOGS                folder for logs by job, attempt and node (slurm-logs)
#   NODE_CACHE          folder on each node's local disk for prepared data and downloads
#   MEETING_SECONDS     rendezvous timeout where the recipe has none: the ranks join within it, or end (120)
#   ISOTUNE_SRUN        further flags for srun
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_*, HF_HUB_OFFLINE, ... are passed to every rank
cd "${ISOTUNE_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
files=${ISOTUNE_FILES:+$ISOTUNE_FILES/} # of an installed isotune (`isotune slurm`); else those of the checkout
# shellcheck source=slurm/environment.sh
. "${files}slurm/environment.sh"

attempt=${SLURM_RESTART_COUNT:-0} # unset in the first attempt
stop='' ranks_signaled='' ended='' step='' launches=0

log() { printf '[slurm %(%F %T)T] %s\n' -1 "$*"; }

export NODES=$SLURM_JOB_NUM_NODES PROCESSES HOST PORT ENGINE LOGS ISOTUNE_VERDICT MEETING_SECONDS=${MEETING_SECONDS:-}
PROCESSES=${SLURM_NTASKS_PER_NODE:-1}
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then PROCESSES=$SLURM_GPUS_ON_NODE; fi
PROCESSES=${PROCESSES_PER_NODE:-$PROCESSES}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# As sbatch's %A_%a. The last job of an array has the array's own number, which scontrol takes for all of its jobs.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
LOGS=$(realpath -m "${LOGS:-slurm-logs}")/$SLURM_JOB_NAME-$job
if [ -z "${ENGINE:-}" ]; then
    if [ $((NODES * PROCESSES)) -eq 1 ]; then ENGINE=single; else ENGINE=ddp; fi
fi

# No $(...) below: bash 5.2 loses a trapped signal, or exits, when it arrives during a command substitution.
launch() {
    # the stop came while the launch before ended: the next attempt finds that one finished, and does this one
    if [ -n "$stop" ]; then requeue "it was told to stop" 75; fi
    launches=$((launches + 1))
    find_port
    ISOTUNE_VERDICT=$LOGS/attempt-$attempt-launch-$launches.json
    mkdir -p "$LOGS" && rm -f "$ISOTUNE_VERDICT" || exit 2
    if [ ! -f "${files}accelerate_configs/$ENGINE.yaml" ]; then
        log "there is no accelerate_configs/$ENGINE.yaml: ENGINE names one of" "${files}"accelerate_configs/*.yaml
        exit 2
    fi
    log "job $SLURM_JOB_ID, attempt $attempt: $NODES nodes ($SLURM_JOB_NODELIST) x $PROCESSES processes, $ENGINE, rendezvous at $HOST:$PORT"
    log "logs $LOGS/attempt-$attempt-*.log"

    trap 'stop=1' USR1  # the time limit is near (--signal=B:USR1@...), or the user asks for a checkpoint and a requeue
    trap 'ended=1' TERM # scancel, or the end of a preemption's grace time: not to be requeued here
    read -ra more <<<"${ISOTUNE_SRUN:-}"
    # One launcher per node with all resources of the job there, whatever --ntasks-per-node or --gpus-per-task says.
    # In the background, because a trap runs only after a foreground command has ended.
    unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_TRES_PER_TASK
    srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=1 --wait=300 \
        "${more[@]}" bash "${files}slurm/node.sh" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" # returns early on a signal
        [ -n "$stop" ] || continue
        [ -n "$ranks_signaled" ] || log "the ranks are told to stop"
        ranks_signaled=1
        if kill -USR1 "$step" 2>/dev/null; then sleep 2; fi # repeat: the ranks may not handle signals yet
    done
    conclude
}

# Choose a free port for this job. The batch script runs on the first node, so it sees which ports are in use there.
find_port() {
    local tries
    PORT=$((20000 + (SLURM_JOB_ID * 7 + attempt) % 10000))
    for ((tries = 0; tries < 1000; tries++)); do
        (: </dev/tcp/localhost/"$PORT") 2>/dev/null || (: </dev/tcp/"$HOST"/"$PORT") 2>/dev/null || return
        PORT=$((20000 + (PORT + 1 - 20000) % 10000))
    done
}

# Read the job status that the run wrote. srun's status is useless: 1 after any launcher error, 0 after a lost node.
read_job_status() {
    local line entry='^ *"(status|exit_status|message|run)": "?(.*[^",])"?,?$'
    status='' exit_status='' message='' run=''
    [ -f "$ISOTUNE_VERDICT" ] || return
    while IFS= read -r line; do
        if [[ $line =~ $entry ]]; then printf -v "${BASH_REMATCH[1]}" %s "${BASH_REMATCH[2]}"; fi
    done <"$ISOTUNE_VERDICT"
}

conclude() {
    local status exit_status message run
    read_job_status
    case $status:$exit_status in
    finished:0)
        if [ -f "$run/metrics.jsonl" ]; then ISOTUNE_VERDICT='' in_environment python -m isotune.report.job "$run"; fi
        return 0 # the batch script continues
        ;;
    paused:0) return 0 ;;
    preempted:75) requeue "it stopped for a preemption or the time limit" 75 ;;
    superseded:*) log "$message" && exit 1 ;;
    failed:2) log "$message: not requeued" && exit 2 ;;
    esac
    if [ -n "$stop" ] && [ "$status" != failed ]; then requeue "it was told to stop and wrote no final status" 75; fi
    # A fault of the program would repeat, so it is not requeued. A lost node is, and Slurm may not know of it yet.
    if [ -z "$ended" ] && ! nodes_answer; then requeue "a node does not answer" 1; fi
    log "${status:-killed} (exit status ${exit_status:-unknown}), not requeued: ${message:-no message}; see $LOGS"
    exit 1
}

nodes_answer() {
    timeout 60 srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 true 2>/dev/null
}

# Requeue this job unless Slurm has ended or restarted it already: requeue REASON STATUS
requeue() {
    if [ -n "$ended" ] || ! scontrol -o show job "$job" | grep -q "JobState=RUNNING .* Restarts=$attempt "; then
        log "$1, and Slurm has ended this attempt: not requeued"
    elif [ "$attempt" -ge "${MAX_RESTARTS:-100}" ]; then
        log "$1; the limit of $attempt restarts is reached (MAX_RESTARTS): submit it again to resume"
    elif scontrol requeue "$job"; then
        log "$1: requeued"
        exit 0
    else
        log "$1, and this cluster does not requeue: submit it again to resume"
    fi
    exit "$2"
}
