"""Environment variables that hold numbers, checked once at the start: libraries read them with a bare `int`."""

from collections.abc import Mapping

from isotune.io.errors import UserError, shown

MOST = 1_000_000_000
MAX_PROCESSES = 100_000  # of a launch
# the smallest number that each may hold; a variable that is empty or absent is none
NUMBERS = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT", "SLURM_RESTART_COUNT", "SLURM_PROCID"), 0),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NNODES"), 1),
    **dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "ACCELERATE_DEEPSPEED_ZERO_STAGE"), 0),
}


def check_numbers(environment: Mapping[str, str]) -> None:
    """UserError for the first variable whose text is no whole number in its range."""
    for name, least in NUMBERS.items():
        text = environment.get(name, "").strip()
        if text and not (text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= MOST):
            raise UserError(
                f"the environment variable {name} is {shown(text)}: it takes a whole number from {least} on"
            )
