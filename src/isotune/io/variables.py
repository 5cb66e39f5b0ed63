"""Environment variables that hold numbers, checked once at the start: libraries read them with a bare `int`."""

import math
from collections.abc import Mapping

from isotune.io.errors import UserError, shown

MOST = 1_000_000_000
PAUSE = "ISOTUNE_PAUSE_AT_EVALUATION"  # the evaluation of a run, from 1, after which it writes a checkpoint and ends
MAX_PROCESSES = 100_000  # of a launch
MOST_SECONDS = 10_000_000
# the smallest and the largest number that each may hold; a variable that is empty or absent is none
NUMBERS = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "SLURM_RESTART_COUNT", "SLURM_PROCID"), (0, MOST)),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NNODES"), (1, MOST)),
    **dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"), (0, MOST)),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": (0, 3),
    "MASTER_PORT": (0, 65_535),
    PAUSE: (1, MOST),
}
SECONDS = ("MEETING_SECONDS",)  # which need not be whole


def check_numbers(environment: Mapping[str, str]) -> None:
    """UserError for the first variable whose text is no number in its range."""
    for name, (least, most) in NUMBERS.items():
        text = environment.get(name, "").strip()
        if text and not (text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= most):
            range_ = f"from {least} on" if most == MOST else f"from {least} to {most:,}"
            raise UserError(f"the environment variable {name} is {shown(text)}: it takes a whole number {range_}")
    for name in SECONDS:
        text = environment.get(name, "").strip()
        if text and not 0 < _seconds(text) <= MOST_SECONDS:
            takes = f"a number of seconds above 0, at most {MOST_SECONDS:,}"
            raise UserError(f"the environment variable {name} is {shown(text)}: it takes {takes}")


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
