# shellcheck shell=bash
# How to find Python on the batch host and on every node. Sourced, not run.
#
# Set what applies before sbatch, or here for all users. Default: the checkout's .venv, otherwise the PATH.
#   ISOTUNE_MODULES="cuda/12.8 gcc"     environment modules to load first
#   ISOTUNE_VENV=~/envs/isotune         a virtual environment
#   ISOTUNE_CONDA=isotune               a conda environment, by name or folder
#   ISOTUNE_CONTAINER=~/isotune.sif     an Apptainer image (ISOTUNE_CONTAINER_FLAGS: more binds)
# Pyxis: leave these empty and set ISOTUNE_SRUN="--container-image=... --container-mounts=$PWD" (see launch.sh).

# Run a command in the environment.
in_environment() (
    set +eu # activation scripts may use unset variables
    if [ -n "${ISOTUNE_MODULES:-}" ]; then
        read -ra modules <<<"$ISOTUNE_MODULES"
        module load "${modules[@]}" || exit 2
    fi
    if [ -n "${ISOTUNE_VENV:-}" ]; then
        # shellcheck disable=SC1091
        . "$ISOTUNE_VENV/bin/activate" || exit 2
    elif [ -n "${ISOTUNE_CONDA:-}" ]; then
        eval "$(conda shell.bash hook)" && conda activate "$ISOTUNE_CONDA" || exit 2
    elif [ -z "${ISOTUNE_CONTAINER:-}" ] && [ -f .venv/bin/activate ]; then
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    if [ -n "${ISOTUNE_CONTAINER:-}" ]; then
        read -ra flags <<<"${ISOTUNE_CONTAINER_FLAGS:-}"
        exec apptainer exec --nv --bind "$PWD" "${flags[@]}" "$ISOTUNE_CONTAINER" "$@"
    fi
    exec "$@"
)
