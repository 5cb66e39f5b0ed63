"""`accelerate launch` as `isotune sft --engine ...` starts it: it ends with its parent, and adds no traceback.

The ranks have said what happened, and the job status file records it. What torch's launcher prints of a rank that
failed, a page on every machine, would hide that sentence.
"""

import logging
import signal
import subprocess
import sys

from isotune.io.errors import EXIT_FAULT, EXIT_USER_ERROR, UserError, first_line, write_job_status
from isotune.io.parent_process import signal_when_parent_ends

STOPPED_BY_LAUNCHER = (signal.SIGTERM, signal.SIGINT)  # what it sends to the ranks that are left


def check_config_file(file: str) -> None:
    """UserError for a configuration file that accelerate itself does not take; it would say so in a traceback."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(file)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"--engine {file} is refused by accelerate: {first_line(error)}") from error


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
    given = launch_command_parser().parse_args()
    try:
        check_config_file(given.config_file)
    except UserError as mistake:
        write_job_status(status="failed", exit_status=EXIT_USER_ERROR, message=str(mistake))
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    try:
        launch_command(given)
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
