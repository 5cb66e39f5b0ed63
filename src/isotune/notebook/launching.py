"""Runs an `isotune` command in a process of its own, with its output where the caller's output goes."""

import codecs
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from isotune.io.errors import (
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    JOB_STATUS_FILE,
    Preempted,
    RunFault,
    UserError,
    read_job_status,
)

KILLED_AFTER_SECONDS = 10


def run_command(words: Sequence[str]) -> None:
    """Run `isotune WORDS` to its end and show what it prints; raises what its exit status says, with its sentence.

    An interrupt is passed on once, and the command's own end is waited for: a run writes a checkpoint first.
    """
    with tempfile.TemporaryDirectory(prefix="isotune-") as folder:
        file = Path(folder) / "status.json"
        environment = {**os.environ, JOB_STATUS_FILE: str(file), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "isotune.cli", *words]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _show(process)
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=KILLED_AFTER_SECONDS)
            process.kill()
            process.wait()
            raise
        message = str(read_job_status(file).get("message") or f"isotune {words[0]} ended with {process.returncode}")
    if process.returncode == EXIT_USER_ERROR:
        raise UserError(message)
    if process.returncode == EXIT_PREEMPTED:
        raise Preempted(message)
    if process.returncode != 0:
        raise RunFault(message)


def _show(process: "subprocess.Popen[bytes]") -> None:
    """Print what a process prints, as it comes, until it ends; the first interrupt is the process's."""
    assert process.stdout is not None
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    interrupted = False
    while True:
        try:
            if not (read := os.read(process.stdout.fileno(), 65536)):
                break
            sys.stdout.write(decode(read))
            sys.stdout.flush()
        except KeyboardInterrupt:
            if interrupted or sys.platform == "win32":  # which has no signal that asks, only an end
                raise
            interrupted = True
            process.send_signal(signal.SIGINT)
    process.wait()


def as_flags(keys: Mapping[str, Any]) -> list[str]:
    """Python values as the words of a command line; None leaves a key out."""
    words: list[str] = []
    for name, value in keys.items():
        if value is None:
            continue
        if isinstance(value, list | tuple) and not any(isinstance(item, Mapping) for item in value):
            words += [f"--{name}", *map(_word, value)]
        else:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(_json_value(value), ensure_ascii=False)
    return str(value)


def _json_value(value: Any) -> Any:
    """A value with all that JSON has no type for, such as paths and NumPy's numbers, as its text."""
    if isinstance(value, Mapping):
        return {str(name): _json_value(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in cast("Sequence[Any]", value)]
    return value if value is None or isinstance(value, str | int | float) else str(value)
