"""`accelerate launch` as `isotune sft --engine ...` starts it: it ends with its parent, and adds no traceback.

The ranks have said what happened, and the job status file records it. What torch's launcher prints of a rank that
failed, a page on every machine, would hide that sentence.
"""

import logging
import signal
import subprocess
import sys

from isotune.io.errors import EXIT_FAULT
from isotune.io.parent_process import signal_when_parent_ends

STOPPED_BY_LAUNCHER = (signal.SIGTERM, signal.SIGINT)  # what it sends to the ranks that are left


def main() -> None:
    """Launch what the command line says, and exit with 0 or 1."""
    if signal_when_parent_ends():
        sys.exit(EXIT_FAULT)
    import torch.distributed.run  # noqa: F401  (it sets the levels of these logs while it is imported)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args())
    except (SignalException, subprocess.CalledProcessError):
        sys.exit(EXIT_FAULT)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and -failure.exitcode not in STOPPED_BY_LAUNCHER:  # it could not say so itself
                name = signal.Signals(-failure.exitcode).name
                print(f"error: process {rank} of the launch was ended by {name}", file=sys.stderr)
        sys.exit(EXIT_FAULT)


if __name__ == "__main__":
    main()
