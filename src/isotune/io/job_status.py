"""The job status file: how a script ended, for the batch script that started it.

Launchers replace every exit status but 0 by 1, and srun may lose it. A batch script therefore names a file in the
environment variable ISOTUNE_VERDICT and reads it when the processes are gone. Without the variable this module does
nothing. The file is JSON with the keys `status` (running, preempted, finished, failed, superseded), `exit_status` (null
while the script runs) and `message`; a training run adds the keys of its status.json and `run`, its folder.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

from isotune.io.files import replace_file

VARIABLE = "ISOTUNE_VERDICT"
EXIT_STOPPED = 75
EXIT_USER_ERROR = 2


def write_job_status(**content: Any) -> None:
    """Merge `content` into the job status file.

    Rank 0 reports for all ranks. Another rank's error counts only while rank 0 has reported no end, as when its machine
    is gone. A mistake in the user's input is never overwritten: what fails later fails because of it.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    file = Path(name)
    current = read_job_status(file)
    is_main = os.environ.get("RANK", "0") == "0"
    has_ended = current.get("exit_status") is not None
    if not is_main and (has_ended or content.get("exit_status") == 0):
        return
    if current.get("exit_status") == EXIT_USER_ERROR:
        return
    # ranks of several machines may write at once
    staging = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        replace_file(file, json.dumps({**current, **content}, indent=2) + "\n", staging)
    except OSError as error:  # a batch script that finds no file knows that the run was killed
        print(f"note        {file} cannot be written: {error.strerror}", file=sys.stderr)


def is_launched_by_batch_script() -> bool:
    """Whether this process is a rank of a launcher whose batch script reads the job status file.

    A launcher answers status 75 with a page of tracebacks on every node, and srun then ends the other nodes. Such ranks
    write the preemption into the file and leave with 0.
    """
    return bool(os.environ.get(VARIABLE)) and "LOCAL_RANK" in os.environ


def read_job_status(file: Path) -> dict[str, Any]:
    """The content of a job status file; empty where the file is absent or not a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], content) if isinstance(content, dict) else {}


def install_early_signal_handlers() -> None:
    """Until training installs its own handlers, SIGTERM and SIGUSR1 end the process as preempted.

    Nothing is lost at that point, and the job may run again. Without the handlers, ranks would ignore these signals
    too where their launcher ignores them.
    """
    if os.environ.get(VARIABLE):
        signal.signal(signal.SIGTERM, _stop_early)
        signal.signal(signal.SIGUSR1, _stop_early)


def _stop_early(number: int, frame: FrameType | None) -> None:
    if read_job_status(Path(os.environ[VARIABLE])).get("exit_status") is not None:
        return  # the script ends by itself in a moment
    message = f"stopped by {signal.Signals(number).name} before the first step: the same command begins again"
    write_job_status(status="preempted", exit_status=EXIT_STOPPED, message=message)
    os.write(2, f"{message}\n".encode())
    os._exit(EXIT_STOPPED)  # not 0: another rank may be further, and the launcher must not let it wait for this one
