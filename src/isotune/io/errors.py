"""Errors and how a script ends: a user's mistake is answered with one sentence and exit status 2, never a traceback.

Launchers replace every exit status but 0 by 1, and srun may lose it. A batch script therefore names a job status file
in the environment variable ISOTUNE_VERDICT and reads it when the processes are gone; without the variable none is
written. It is JSON with the keys `status` (running, preempted, paused, finished, failed, superseded), `exit_status`
(null while the script runs) and `message`, and `reason` where other values of the recipe may do better: memory or
values; a training run adds the keys of its status.json and `run`, its folder.
"""

import argparse
import difflib
import errno
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from isotune.io.files import replace_file

EXIT_FAULT, EXIT_USER_ERROR, EXIT_PREEMPTED = 1, 2, 75
JOB_STATUS_FILE = "ISOTUNE_VERDICT"  # the environment variable
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEMORY, VALUES = "memory", "values"  # why a run failed by its recipe: too large, or values that exclude each other
LONGEST_LINE = 1_000  # characters of what a library says; it may repeat a whole file
MOST = 2**32  # of a number on the command line
_AWAY = "its disk went away or fails: look after it and run again"
# errors of the file system that say what the user can do, by their number
MENDABLE = {
    **dict.fromkeys(NO_ROOM, "there is no room on the disk: free some space and run again"),
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    **dict.fromkeys((errno.EIO, errno.ESTALE), _AWAY),
}
# those that other things than files have too: they are the file system's where they come with a file
OF_FILES = {
    **dict.fromkeys((errno.ENOTCONN, errno.ESHUTDOWN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN), _AWAY),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "no permission"),
}


class OneSentence(Exception):
    """An error that is one sentence, in a notebook too, where everything else comes with a traceback.

    `reason` is MEMORY or VALUES where other values of the same recipe may do better, and None elsewhere.
    `prints`: whether this process prints it; None leaves it to local rank 0, where all ranks raise the same.
    """

    prints: bool | None = None

    def __init__(self, *said: object, reason: str | None = None) -> None:
        super().__init__(*said)
        self.reason = reason

    def _render_traceback_(self) -> list[str]:
        """What IPython shows."""
        return [f"{type(self).__name__}: {self}"]


class UserError(OneSentence):
    """A mistake that the user can correct: the message is one sentence that names the file, key or row."""


Complain = Callable[[str], None]  # takes the sentence of a mistake: `refuse`, or the `append` of a list


def refuse(sentence: str) -> NoReturn:
    """Raise the first mistake at once; `isotune plan` passes a list's `append` instead and collects them all."""
    raise UserError(sentence)


def is_first_process() -> bool:
    """Whether this is global rank 0, by the launcher's RANK: it can be asked before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to LONGEST_LINE, for a message that must stay one sentence."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def shown(value: object, characters: int = 60) -> str:
    """A value as a message quotes it, cut to `characters` of what is between the quotes."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= characters else text[: characters - 3] + "..."
    return repr(text) if isinstance(value, str) else text


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
        sentence = message.removeprefix("argument ")
        sentence = sentence if len(sentence) <= 400 else f"{sentence[:400]}..."
        raise UserError(f"{sentence} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]  (argparse overloads it by its namespace)
        """As argparse's; a number that is not finite, or beyond MOST, is a mistake."""
        parsed, rest = super().parse_known_args(args, namespace)
        for name, value in vars(parsed).items():
            if type(value) in (int, float) and not -MOST <= value <= MOST:
                self.error(f"--{name} is {shown(value)}: it takes a number of at most {MOST:,}")
        return parsed, rest


class OfOneRank(OneSentence):
    """What one rank ran into alone, and prints itself, or what it was told by the rank that failed first."""

    def __init__(self, sentence: str, *, prints: bool = False, reason: str | None = None) -> None:
        super().__init__(sentence, reason=reason)
        self.prints: bool | None = prints


class RankError(OfOneRank, UserError):
    """A mistake that the user can correct, and that one rank alone ran into."""


class RunFault(OneSentence):
    """The run cannot go on, and no input is at fault: one sentence that says what was observed."""


class RankFault(OfOneRank, RunFault):
    """What one rank ran into, and no input is at fault."""


class Superseded(RunFault):
    """Another process has taken over the run folder: one sentence that names it. This process writes nothing more."""


class Preempted(OneSentence):
    """The run was told to stop and has written a checkpoint: one sentence that says how to resume."""


class Paused(Preempted):
    """The run has come to the evaluation at which it was to pause, and has written a checkpoint: no failure."""


class AlreadyDone(OneSentence):
    """The requested result exists: one sentence that says where. The script succeeds."""


class Explain(Protocol):
    """Makes of an error what a rank of a launch raises in its place, the others knowing of it; `where` ends a fault."""

    def __call__(self, error: Exception, *, where: str = "") -> Exception: ...


_explain: Explain | None = None  # while this process belongs to a launch of several ranks


def explain_by(explain: Explain | None) -> None:
    """From now on `explain` is this."""
    global _explain
    _explain = explain


def explain(error: Exception, *, where: str = "") -> Exception:
    """What this process raises in the place of an error: of a disk's one sentence, of a launch's what its ranks say."""
    error = as_user_error(error) or error
    return error if _explain is None else _explain(error, where=where)


def as_user_error(error: BaseException, file: Path | None = None) -> UserError | None:
    """The sentence of an OSError that the user can mend, whoever ran into it; None for every other error."""
    if not isinstance(error, OSError):
        return None
    named = file or (error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None)
    known = MENDABLE if named is None else MENDABLE | OF_FILES
    if error.errno not in known:
        return None
    if named is None:
        return UserError(known[error.errno])
    return UserError(f"{shown(os.fsdecode(named), 200)} cannot be written or opened: {known[error.errno]}")


def outcome_of(error: BaseException) -> tuple[str, int]:
    """What status.json and the job status file say of a run that ended with this error: `status` and exit status."""
    statuses = {UserError: EXIT_USER_ERROR, Paused: 0, Preempted: EXIT_PREEMPTED}
    error = as_user_error(error) or error
    status = next((number for kind, number in statuses.items() if isinstance(error, kind)), EXIT_FAULT)
    words = {Paused: "paused", Preempted: "preempted", Superseded: "superseded"}
    return words.get(type(error), "failed"), status


def reason_of(error: BaseException) -> dict[str, str]:
    """The key `reason` of status.json and the job status file, for an error that has one."""
    return {"reason": error.reason} if isinstance(error, OneSentence) and error.reason else {}


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with the status of the contract.

    A `UserError` prints one line on stderr and exits with 2, a `RunFault` one line and 1, `Preempted` one line and 75,
    `Paused` one line and 0.
    Where all ranks raise the same error, only local rank 0 prints it; else the error says by `prints` whether its rank
    does. The job status file records the end too.
    """
    if os.environ.get(JOB_STATUS_FILE):
        # Until training installs its own handlers. Nothing is lost at that point, and the job may run again; without
        # these, ranks would ignore the signals too where their launcher ignores them.
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # Windows has no SIGUSR1
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _stop_early)
    # one that is no rank is everybody's mistake
    is_local_main = not (os.environ.get("LOCAL_RANK") or "0").strip().lstrip("0").isdecimal()
    from isotune.io.variables import check_numbers  # imports this module

    try:
        check_numbers(os.environ)
        try:
            status = main() or 0
        except Exception as error:
            said = explain(error)
            if said is error:
                raise
            raise said from error
    except (UserError, RunFault, Preempted) as error:
        word, status = outcome_of(error)
        write_job_status(status=word, exit_status=status, message=str(error), **reason_of(error))
        if is_local_main if error.prints is None else error.prints:
            print(error if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr, flush=True)
        if status == EXIT_PREEMPTED and os.environ.get(JOB_STATUS_FILE) and "LOCAL_RANK" in os.environ:
            # A launcher answers 75 with a page of tracebacks on every node, and srun then ends the other nodes.
            status = 0  # the batch script reads the preemption in the file
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


def end_process(sentence: str, status: str | None = None, exit_status: int = EXIT_FAULT) -> NoReturn:
    """End this process from any of its threads: one line, the exit status, and `status` in the job status file.

    In a launch of several ranks the first one that ends so prints the line.
    """
    error = explain(UserError(sentence) if exit_status == EXIT_USER_ERROR else RunFault(sentence))
    if not isinstance(error, OneSentence) or error.prints is not False:
        os.write(2, f"error: {sentence}\n".encode())
    if status is not None:
        write_job_status(status=status, exit_status=exit_status, message=sentence)
    os._exit(exit_status)


def write_job_status(**content: Any) -> None:
    """Merge `content` into the job status file.

    Rank 0 reports for all ranks. Another rank's error counts only while rank 0 has reported no end, as when its machine
    is gone. A mistake in the user's input is never overwritten: what fails later fails because of it.
    """
    name = os.environ.get(JOB_STATUS_FILE)
    if not name:
        return
    file = Path(name)
    current = read_job_status(file)
    is_main = is_first_process()
    has_ended = current.get("exit_status") is not None
    is_told = not is_main and (has_ended or content.get("exit_status") == 0)
    if is_told or current.get("exit_status") == EXIT_USER_ERROR:
        return
    # ranks of several machines may write at once
    staging = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    text = json.dumps({**current, **content}, indent=2, ensure_ascii=False)  # a batch script takes a path as it is
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)  # of names that are not UTF-8
    try:
        replace_file(file, text + "\n", staging)
    except OSError as error:  # a batch script that finds no file knows that the run was killed
        print(f"note        {file} cannot be written: {error.strerror}", file=sys.stderr)


def read_job_status(file: Path) -> dict[str, Any]:
    """The content of a job status file; empty where the file is absent or not a JSON object."""
    from isotune.io.reading import Unreadable, read_json_object  # imports YAML, and every command imports this module

    try:
        return read_json_object(file)
    except (FileNotFoundError, Unreadable):
        return {}


def _stop_early(number: int, frame: FrameType | None) -> None:
    if read_job_status(Path(os.environ[JOB_STATUS_FILE])).get("exit_status") is not None:
        return  # the script ends by itself in a moment
    message = f"stopped by {signal.Signals(number).name} before the first step: the same command begins again"
    write_job_status(status="preempted", exit_status=EXIT_PREEMPTED, message=message)
    os.write(2, f"{message}\n".encode())
    os._exit(EXIT_PREEMPTED)  # not 0: another rank may be further, and the launcher must not let it wait for this one
