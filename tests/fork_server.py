"""A process that has imported the libraries once, and forks itself for every script that a test runs.

    python tests/fork_server.py PADDING      (started by `tests.forking`; requests come over standard input)

To import torch, transformers and their like takes seconds, and most small runs take less. A forked process is a process
of its own: command line, environment, working directory, standard streams, signals and exit status are those of the
command that it stands for, and a command that it starts in turn with this same Python is forked too, so `accelerate
launch` runs its own code and its ranks are its children. Nothing here computes before a fork: a child finds the
libraries as they are after their import, with no thread of OpenMP or autograd started.

What a child does not show is the start itself: the order of imports, warnings on import, a module that is used without
having been imported, and the restart by `isotune.run.malloc_tuning` (this process has its settings in the environment
from the start, so the scripts see nothing to do). Ranks share the seed of Python's string hashes. Tests of those ask
for a fresh interpreter: `run_command(..., fresh=True)`.

A request is one JSON line with the descriptors of stdin, stdout and stderr beside it, on a socket of its own; the
answers are a line with the process id and a line with the exit status, negative for a signal.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

REQUEST_BYTES = 1 << 20
LIBRARIES = (
    "accelerate.commands.launch",
    "deepspeed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "sklearn.metrics",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.run",
    "transformers.models.bert.modeling_bert",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "transformers.trainer",
    "isotune.checkpoint.export",
    "isotune.checkpoint.final_model",
    "isotune.checkpoint.resume",
    "isotune.evaluation.classification.evaluate",
    "isotune.evaluation.generation.chat",
    "isotune.evaluation.generation.evaluate",
    "isotune.preflight.startup_check",
    "isotune.report.loss_curve",
    "isotune.report.model_card",
    "isotune.training.from_recipe",
)
HUB_SETTINGS = ("huggingface_hub.constants", "datasets.config")  # made of HF_... while they are imported
PATH = sys.path[1:]  # without the folder of this file


def import_libraries() -> None:
    """Everything that the scripts import, and nothing computed."""
    with tempfile.TemporaryFile() as noise, redirected(2, noise.fileno()):
        try:
            _import()
        except BaseException:
            noise.seek(0)
            print(noise.read().decode())
            raise


@contextlib.contextmanager
def redirected(number: int, target: int) -> Iterator[None]:
    """File descriptor `number` is a copy of `target` meanwhile."""
    kept = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


def _import() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for a GPU, and warn
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("opt")  # compiles its patterns
    del os.environ["DS_ACCELERATOR"]
    gc.collect()
    gc.freeze()  # a collection in a child passes over the million objects of the libraries, whose pages stay shared


def serve(requests: socket.socket) -> None:
    """Fork a child for every connection until the other end of `requests` is closed. In a child it does not return."""
    waiting = selectors.DefaultSelector()
    waiting.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is requests:
                _, fds, _, _ = socket.recv_fds(requests, 1, 1)
                if not fds:
                    kill_all(process for process, _ in (key.data for key in waiting.get_map().values() if key.data))
                    return
                with socket.socket(fileno=fds[0]) as connection:
                    start(connection, waiting)
            else:
                process, connection = key.data
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with connection, contextlib.suppress(BrokenPipeError):
                    connection.sendall(f"{status}\n".encode())


def kill_all(processes: Iterable[int]) -> None:
    """SIGKILL to what still runs, and to what it has started in its session: the tests were broken off."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def start(connection: socket.socket, waiting: selectors.BaseSelector) -> None:
    """Fork a child for the request on `connection`, and watch for its end."""
    received, streams, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
    request = json.loads(received)
    process = os.fork()
    if process == 0:
        os.setsid()
        os.chdir(request["cwd"])
        run_and_exit(request["command"], request["environment"], dict(enumerate(streams)))
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{process}\n".encode())
    waiting.register(os.pidfd_open(process), selectors.EVENT_READ, (process, connection.dup()))


class ForkingPopen(subprocess.Popen):
    """subprocess.Popen whose child, where the command is this Python, is a fork of this process.

    `_execute_child` is the one place of CPython 3.11 to 3.13 in which a child starts.
    """

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest: Any) -> None:
        command = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else []
        (_, _, shell, stdin, _, _, stdout, _, stderr, _, _, _, _, _, own_session, _) = rest
        if shell or preexec_fn or executable or command[:1] != [sys.executable]:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if own_session:
                os.setsid()
            os.chdir(cwd or ".")
            streams = {number: fd for number, fd in enumerate((stdin, stdout, stderr)) if fd != -1}
            run_and_exit(command, dict(os.environ if env is None else env), streams)
        self._child_created = True
        self._close_pipe_fds(*(rest[place] for place in (3, 4, 5, 6, 7, 8)))


def run_and_exit(command: list[str], environment: dict[str, str], streams: dict[int, int]) -> None:
    """Become `command`, a Python command line, and leave the process as Python would."""
    status = 1
    try:
        _become(command, environment, streams)
        status = _run(command[1:])
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _become(command: list[str], environment: dict[str, str], streams: dict[int, int]) -> None:
    kept = {number: os.dup(stream) for number, stream in streams.items()}
    for number, stream in kept.items():
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(environment)
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    subprocess.Popen = ForkingPopen
    sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"].Popen = ForkingPopen
    sys.modules["numpy"].random.seed()  # a fresh interpreter draws its seed too
    for module in HUB_SETTINGS:
        importlib.reload(sys.modules[module])
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *PATH]
    _show_in_proc(command, environment)


def _show_in_proc(command: list[str], environment: dict[str, str]) -> None:
    """Write `command` and `environment` over those of this process, which others read in /proc.

    Both lie in the padding that the server was started with; what does not fit is left as it was. Nobody reads the old
    environment any more: `os.environ` has unset and set every variable.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arguments_begin, arguments_end, environment_begin, environment_end = (int(field) for field in fields[45:49])
    variables = [f"{name}={value}" for name, value in environment.items()]
    for words, begin, end in (
        (command, arguments_begin, arguments_end),
        (variables, environment_begin, environment_end),
    ):
        shown = b"".join(os.fsencode(word) + b"\0" for word in words)
        if len(shown) < end - begin:
            ctypes.memmove(begin, shown.ljust(end - begin, b"\0"), end - begin)


def _run(words: list[str]) -> int:
    """Run what follows `python` in a command line; returns the exit status."""
    while words[0] in ("-u", "-X"):
        if words[0] == "-u":
            sys.stdout.reconfigure(write_through=True)
        words = words[1 if words[0] == "-u" else 2 :]
    try:  # what an interpreter puts first in sys.path, which a fork has to do itself
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, os.getcwd())
            sys.modules.pop(words[1], None)  # runpy warns of a module that is there already
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, "")
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.path[:] = PATH
    import_libraries()
    with socket.socket(fileno=0) as pipe:
        serve(pipe)
    os._exit(0)  # nothing of its own to clean up, and the libraries would take seconds for theirs
