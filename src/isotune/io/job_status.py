"""How a script ended, in a file for whoever started it: launchers make 1 of every status but 0, and srun may lose it.

A scheduler's script names the file in the variable ISOTUNE_VERDICT and reads it when the processes are gone. Without
the variable nothing here does anything. Keys: `status` (running, preempted, finished, failed, superseded),
`exit_status` (null while it runs) and `message`; a training run adds those of its status.json and `run`, its folder.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

VARIABLE = "ISOTUNE_VERDICT"
EXIT_STOPPED = 75
EXIT_USER_ERROR = 2


def write_job_status(**content: Any) -> None:
    """Put `content` over what the file says.

    The first process speaks for all. Another one's complaint is heard where the first has said nothing final, as when
    its machine is gone; and a mistake in the input stays what it is, whatever breaks because of it.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    file = Path(name)
    said = read_verdict(file)
    is_first = os.environ.get("RANK", "0") == "0"
    ended = said.get("exit_status") is not None
    if (not is_first and (ended or content.get("exit_status") == 0)) or (said.get("exit_status") == EXIT_USER_ERROR):
        return
    staging = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        staging.write_text(json.dumps({**said, **content}, indent=2) + "\n", encoding="utf-8")
        staging.replace(file)
    except OSError as error:  # the script that reads it takes no verdict for a run that was killed
        print(f"note        {file} cannot be written: {error.strerror}", file=sys.stderr)


def is_read_by_a_script() -> bool:
    """Whether this rank's launcher was started by a script that reads the verdict.

    A launcher answers a status of 75 with a page of tracebacks on every node, and srun then ends the other nodes; the
    ranks of such a launch say in the verdict that they were stopped, and leave with 0.
    """
    return bool(os.environ.get(VARIABLE)) and "LOCAL_RANK" in os.environ


def read_verdict(file: Path) -> dict[str, Any]:
    """What the file says; nothing where it is absent or broken."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def hear_early_stops() -> None:
    """Until training listens, SIGTERM and SIGUSR1 end the process with a verdict: nothing is lost, so run it again.

    A launcher that ignores these signals, so as to leave them to its ranks, would else have its ranks ignore them too.
    """
    if os.environ.get(VARIABLE):
        signal.signal(signal.SIGTERM, _stop_early)
        signal.signal(signal.SIGUSR1, _stop_early)


def _stop_early(number: int, frame: FrameType | None) -> None:
    if read_verdict(Path(os.environ[VARIABLE])).get("exit_status") is not None:
        return  # the end is near, and is worth waiting for
    message = f"stopped by {signal.Signals(number).name} before the first step: the same command begins again"
    write_job_status(status="preempted", exit_status=EXIT_STOPPED, message=message)
    os.write(2, f"{message}\n".encode())
    os._exit(EXIT_STOPPED)  # not 0: another rank may be further, and the launcher must not let it wait for this one
