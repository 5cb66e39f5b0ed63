# shellcheck shell=bash
# Sourced by the batch scripts: `launch SCRIPT [FLAGS]` runs a script of this checkout on every node of the job, and
# sees it through time limits, preemptions and lost nodes; it returns when the script has finished, and ends the job in
# every other case. docs/slurm.md tells the whole story.
#
# Set before sbatch, all optional (and see environment.sh):
#   ENGINE              a name in accelerate_configs/; unset: single for one process, else ddp
#   PROCESSES_PER_NODE  unset: the GPUs of a node, without any its --ntasks-per-node
#   MAX_RESTARTS        lives of a job after its first (100)
#   LOGS                folder for logs by job, life and node (slurm-logs)
#   NODE_CACHE          folder on each node's own disk for prepared data and downloads
#   MEETING_SECONDS     how long ranks may look for each other before the one that is missing is named (60)
#   ISOTUNE_SRUN        more flags for srun
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_*, HF_HUB_OFFLINE, ... reach every rank as they are
cd "${ISOTUNE_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
. slurm/environment.sh

life=${SLURM_RESTART_COUNT:-0} # unset in the first one
stop='' told_ranks='' ended='' step='' launches=0

say() { printf '[slurm %(%F %T)T] %s\n' -1 "$*"; }

export NODES=$SLURM_JOB_NUM_NODES PROCESSES HOST PORT ENGINE LOGS ISOTUNE_VERDICT MEETING_SECONDS=${MEETING_SECONDS:-60}
PROCESSES=${SLURM_NTASKS_PER_NODE:-1}
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then PROCESSES=$SLURM_GPUS_ON_NODE; fi
PROCESSES=${PROCESSES_PER_NODE:-$PROCESSES}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
LOGS=$(realpath -m "${LOGS:-slurm-logs}")/$SLURM_JOB_NAME-$SLURM_JOB_ID
if [ -z "${ENGINE:-}" ]; then
    if [ $((NODES * PROCESSES)) -eq 1 ]; then ENGINE=single; else ENGINE=ddp; fi
fi

# From here on no $(...): bash 5.2 loses a trapped signal, or ends, when it comes while one is being read.
launch() {
    launches=$((launches + 1))
    find_port
    ISOTUNE_VERDICT=$LOGS/life-$life-launch-$launches.json
    mkdir -p "$LOGS" && rm -f "$ISOTUNE_VERDICT" || exit 2
    if [ ! -f "accelerate_configs/$ENGINE.yaml" ]; then
        say "there is no accelerate_configs/$ENGINE.yaml: ENGINE names one of" accelerate_configs/*.yaml
        exit 2
    fi
    say "job $SLURM_JOB_ID, life $life: $NODES nodes ($SLURM_JOB_NODELIST) x $PROCESSES processes, $ENGINE, meeting at $HOST:$PORT"
    say "logs $LOGS/life-$life-*.log"

    trap 'stop=1' USR1  # the time limit is near (--signal=B:USR1@...), or the user wants a checkpoint and a new life
    trap 'ended=1' TERM # scancel, or the end of a preemption's grace time: not ours to requeue
    read -ra more <<<"${ISOTUNE_SRUN:-}"
    # One launcher a node, with all that the job has there, whatever --ntasks-per-node or --gpus-per-task was asked.
    # In the background, for a trap waits for whatever runs in the foreground.
    unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_TRES_PER_TASK
    srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=1 --wait=300 \
        "${more[@]}" bash slurm/node.sh "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" # a signal ends it early
        [ -n "$stop" ] || continue
        [ -n "$told_ranks" ] || say "the ranks are told to stop"
        told_ranks=1
        if kill -USR1 "$step" 2>/dev/null; then sleep 2; fi # and again: they may not have listened yet
    done
    conclude
}

# A port of this job's own. The batch script runs on the first node, so it can see what is taken there.
find_port() {
    local tries
    PORT=$((20000 + (SLURM_JOB_ID * 7 + life) % 10000))
    for ((tries = 0; tries < 1000; tries++)); do
        (: </dev/tcp/localhost/"$PORT") 2>/dev/null || (: </dev/tcp/"$HOST"/"$PORT") 2>/dev/null || return
        PORT=$((20000 + (PORT + 1 - 20000) % 10000))
    done
}

# What the run itself wrote. srun's status tells nothing: launchers make 1 of everything, a signal or lost node makes 0.
read_verdict() {
    local line entry='^ *"(status|exit_status|message|run)": "?(.*[^",])"?,?$'
    status='' exit_status='' message='' run=''
    [ -f "$ISOTUNE_VERDICT" ] || return
    while IFS= read -r line; do
        if [[ $line =~ $entry ]]; then printf -v "${BASH_REMATCH[1]}" %s "${BASH_REMATCH[2]}"; fi
    done <"$ISOTUNE_VERDICT"
}

conclude() {
    local status exit_status message run
    read_verdict
    case $status:$exit_status in
    finished:0)
        if [ -f "$run/metrics.jsonl" ]; then ISOTUNE_VERDICT='' in_environment python -m isotune.report.job "$run"; fi
        return 0 # what comes next in the batch script
        ;;
    preempted:75) go_on "it stopped for a preemption or the time limit" 75 ;;
    superseded:*) say "$message" && exit 1 ;;
    failed:2) say "$message: not requeued" && exit 2 ;;
    esac
    if [ -n "$stop" ] && [ "$status" != failed ]; then go_on "it was told to stop and could not say how it ended" 75; fi
    # A fault of the program would come again. A node that is gone is no fault, and Slurm may not have noticed yet.
    if [ -z "$ended" ] && ! nodes_answer; then go_on "a node does not answer" 1; fi
    say "${status:-killed} (exit status ${exit_status:-unknown}), not requeued: ${message:-no word}; see $LOGS"
    exit 1
}

nodes_answer() {
    timeout 60 srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 true 2>/dev/null
}

# Requeue this job, unless it is over for everybody else: go_on REASON STATUS
go_on() {
    if [ -n "$ended" ] || ! scontrol -o show job "$SLURM_JOB_ID" | grep -q "JobState=RUNNING .* Restarts=$life "; then
        say "$1, and Slurm has ended this life of the job: not requeued from here"
    elif [ "$life" -ge "${MAX_RESTARTS:-100}" ]; then
        say "$1; $life restarts are enough (MAX_RESTARTS): submit it again and it goes on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "$1: requeued"
        exit 0
    else
        say "$1, and this cluster does not requeue: submit it again and it goes on"
    fi
    exit "$2"
}
