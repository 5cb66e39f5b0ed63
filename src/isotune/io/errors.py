"""A user's mistake is answered with one sentence and exit status 2, never with a traceback."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from isotune.io.job_status import EXIT_STOPPED, EXIT_USER_ERROR, hear_early_stops, is_read_by_a_script, write_job_status

EXIT_FAULT = 1
EXIT_PREEMPTED = EXIT_STOPPED


class UserError(Exception):
    """Something that the user can put right: the message is one sentence that names the file, key or row."""


Complain = Callable[[str], None]  # takes the sentence of a mistake: `refuse`, or the `append` of a list


def refuse(sentence: str) -> NoReturn:
    """Answer the first mistake at once; a plan, which wants all of them, collects the sentences instead.

    Raises:
        UserError: always.
    """
    raise UserError(sentence)


class RunFault(Exception):
    """The run cannot go on as it was asked, and no input is at fault: one sentence that says what was seen."""


class Superseded(RunFault):
    """Another process has taken over the run folder: one sentence that names it. This one writes nothing more."""


class Preempted(Exception):
    """The run was told to stop and has written a checkpoint: one sentence that says how to go on."""


class AlreadyDone(Exception):
    """What was asked for is there already: one sentence that says where. It is a success."""


def exit_status(error: BaseException) -> int:
    """The exit status that an error stands for."""
    return {UserError: EXIT_USER_ERROR, Preempted: EXIT_PREEMPTED}.get(type(error), EXIT_FAULT)


def word_for(error: BaseException) -> str:
    """What status.json and a verdict call a run that ended so."""
    return {Preempted: "preempted", Superseded: "superseded"}.get(type(error), "failed")


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and leave the process with the exit status that the contract promises.

    A `UserError` becomes one line on stderr and status 2, a `RunFault` one line and status 1, `Preempted` one line and
    status 75. Every rank meets the same one, so only local rank 0 prints it. How it ended is also written down for a
    scheduler's script (see `isotune.io.job_status`).
    """
    hear_early_stops()
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        status = main() or 0
    except (UserError, RunFault, Preempted) as known:
        status = exit_status(known)
        write_job_status(status=word_for(known), exit_status=status, message=str(known))
        if speaks:
            print(known if status == EXIT_PREEMPTED else f"error: {known}", file=sys.stderr, flush=True)
        if status == EXIT_PREEMPTED and is_read_by_a_script():
            status = 0
    except AlreadyDone as done:
        status = 0
        write_job_status(status="finished", exit_status=0, message=str(done))
        if speaks:
            print(done)
    except Exception as unknown:
        write_job_status(status="failed", exit_status=EXIT_FAULT, message=str(unknown) or type(unknown).__name__)
        raise
    else:
        if status == 0:
            write_job_status(status="finished", exit_status=0, message=None)
    sys.stdout.flush()
    sys.exit(status)
