"""`accelerate launch` as `isotune sft --engine ...` starts it: it ends with its parent, and adds no traceback.

The ranks have said what happened, and the job status file records it. What torch's launcher prints of a rank that
failed, a page on every machine, would hide that sentence.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from isotune.io.errors import EXIT_FAULT, JOB_STATUS_FILE, read_job_status

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Launch what the command line says, and exit with 0 or 1."""
    _end_with_parent()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("api", "local_elastic_agent"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args())
    except (SignalException, subprocess.CalledProcessError):
        sys.exit(EXIT_FAULT)
    except ChildFailedError as error:
        if read_job_status(Path(os.environ.get(JOB_STATUS_FILE, os.devnull))).get("exit_status") is None:
            rank, failure = error.get_first_failure()  # nothing but the launcher can tell of a process that was killed
            how = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            print(f"error: process {rank} of the launch ended by {how}", file=sys.stderr)
        sys.exit(EXIT_FAULT)


def _end_with_parent() -> None:
    """Ask the kernel to send SIGTERM when the parent dies, so that no launch outlives it."""
    if sys.platform.startswith("linux"):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            sys.exit(EXIT_FAULT)


if __name__ == "__main__":
    main()
