"""Errors and exit statuses: a user's mistake is answered with one sentence and exit status 2, never a traceback."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from isotune.io.job_status import (
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    install_early_signal_handlers,
    is_launched_by_batch_script,
    write_job_status,
)

EXIT_FAULT = 1
EXIT_PREEMPTED = EXIT_STOPPED


class UserError(Exception):
    """A mistake that the user can correct: the message is one sentence that names the file, key or row."""


Complain = Callable[[str], None]  # takes the sentence of a mistake: `refuse`, or the `append` of a list


def refuse(sentence: str) -> NoReturn:
    """Raise the first mistake at once; `isotune plan` passes a list's `append` instead and collects them all."""
    raise UserError(sentence)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message that must stay one sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(written: object, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name spelled most like `written`, or None where none has a similarity of `cutoff`, from 0 to 1 (equal)."""
    matches = difflib.get_close_matches(str(written), list(names), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(written: object, names: Iterable[str]) -> str:
    """The end of a sentence about a misspelled name: `: did you mean 'x'?`, or else the valid names."""
    names = list(names)
    near = nearest(written, names)
    return f": did you mean {near!r}?" if near else f"; it may have {', '.join(names)}"


class OneSentenceParser(argparse.ArgumentParser):
    """argparse's parser that raises a `UserError` of one sentence instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message with the command that shows the help."""
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class RunFault(Exception):
    """The run cannot go on, and no input is at fault: one sentence that says what was observed."""


class Superseded(RunFault):
    """Another process has taken over the run folder: one sentence that names it. This process writes nothing more."""


class Preempted(Exception):
    """The run was told to stop and has written a checkpoint: one sentence that says how to resume."""


class AlreadyDone(Exception):
    """The requested result exists: one sentence that says where. The script succeeds."""


def exit_status(error: BaseException) -> int:
    """The exit status of an error."""
    return {UserError: EXIT_USER_ERROR, Preempted: EXIT_PREEMPTED}.get(type(error), EXIT_FAULT)


def status_word(error: BaseException) -> str:
    """The `status` in status.json and in the job status file of a run that ended with this error."""
    return {Preempted: "preempted", Superseded: "superseded"}.get(type(error), "failed")


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with the status of the contract.

    A `UserError` prints one line on stderr and exits with 2, a `RunFault` one line and 1, `Preempted` one line and 75.
    All ranks raise the same error, so only local rank 0 prints it. The job status file records the end too
    (`isotune.io.job_status`).
    """
    install_early_signal_handlers()
    is_local_main = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        status = main() or 0
    except (UserError, RunFault, Preempted) as error:
        status = exit_status(error)
        write_job_status(status=status_word(error), exit_status=status, message=str(error))
        if is_local_main:
            print(error if status == EXIT_PREEMPTED else f"error: {error}", file=sys.stderr, flush=True)
        if status == EXIT_PREEMPTED and is_launched_by_batch_script():
            status = 0
    except AlreadyDone as done:
        status = 0
        write_job_status(status="finished", exit_status=0, message=str(done))
        if is_local_main:
            print(done)
    except Exception as error:
        write_job_status(status="failed", exit_status=EXIT_FAULT, message=str(error) or type(error).__name__)
        raise
    else:
        if status == 0:
            write_job_status(status="finished", exit_status=0, message=None)
    sys.stdout.flush()
    sys.exit(status)
