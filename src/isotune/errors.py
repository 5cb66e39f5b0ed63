"""A user's mistake is answered with one sentence and exit status 2, never with a traceback."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_FAULT = 1


class UserError(Exception):
    """Something that the user can put right: the message is one sentence that names the file, key or row."""


class RunFault(Exception):
    """The run cannot go on as it was asked, and no input is at fault: one sentence that says what was seen."""


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and leave the process with the exit status that the contract promises.

    A `UserError` becomes one line on stderr and status 2, a `RunFault` one line and status 1. Every rank meets the
    same one, so only local rank 0 prints it.
    """
    try:
        status = main() or 0
    except (UserError, RunFault) as known:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {known}", file=sys.stderr, flush=True)
        status = EXIT_USER_ERROR if isinstance(known, UserError) else EXIT_FAULT
    sys.stdout.flush()
    sys.exit(status)
