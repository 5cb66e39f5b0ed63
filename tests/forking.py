"""The tests' end of `tests/fork_server.py`: a command is run by a fork of a process that has the libraries loaded."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from isotune.run.malloc_tuning import GPU_DRIVERS, VARIABLE, malloc_tunables

SERVER = Path(__file__).with_name("fork_server.py")
PADDING = "-" * 16384  # room for the longest command line, and environment, that a child shows in /proc
# how variables begin that nothing reads while it is imported, or that a fork reads again (HF_); a server is started for
# each set of the others' values; DeepSpeed is imported for the CPU whatever DS_ACCELERATOR says
READ_LATE = ("ACCELERATE_", "DS_ACCELERATOR", "FSDP_", "HF_", "ISOTUNE_", "MASTER_", "MEETING_SECONDS", "PYTEST_")
READ_LATE += ("PYTHONPATH", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_", "TOKENIZERS_PARALLELISM")
READ_LATE += ("TORCH_EXTENSIONS_DIR", "WORLD_SIZE")

_servers: dict[frozenset, "ForkServer"] = {}


class ForkedProcess:
    """A running fork, with what the tests use of subprocess.Popen."""

    def __init__(self, command: list[str], connection: socket.socket, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.args, self.returncode = command, None
        self._connection, self._stdout, self._stderr = connection, stdout, stderr
        self.pid = self._answer()

    def _answer(self) -> int:
        answer = self._connection.recv(64)
        assert answer, "the fork server has ended: what it printed says why"
        return int(answer)

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._answer()
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; what it printed to stdout and to stderr."""
        self.wait(timeout)
        return self.printed(self._stdout), self.printed(self._stderr)

    def printed(self, stream: IO[bytes]) -> str:
        """What is in a stream by now, with the newlines that text mode makes of carriage returns."""
        text = os.pread(stream.fileno(), os.fstat(stream.fileno()).st_size, 0).decode()
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def send_signal(self, number: int) -> None:
        """Nothing, where the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL to the process and to what it has started in its session."""
        os.killpg(self.pid, signal.SIGKILL)


class ForkServer:
    """One server process, started with the variables that libraries read while they are imported."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(SERVER), PADDING], stdin=theirs, env={**environment, "PADDING": PADDING}, cwd="/"
            )

    def start(self, command: list[str], environment: dict[str, str], cwd: Path, text: str) -> ForkedProcess:
        """Fork a process for `command`, in a session of its own; `text` is its standard input."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"command": command, "environment": environment, "cwd": str(cwd)}
        stdout, stderr = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115  # closed with the process
        with tempfile.TemporaryFile() as stdin:
            stdin.write(text.encode())
            stdin.seek(0)
            with theirs:
                socket.send_fds(self._requests, [b"+"], [theirs.fileno()])
            streams = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(ours, [json.dumps(request).encode()], streams)
        return ForkedProcess(command, ours, stdout, stderr)

    def close(self) -> None:
        """End the server."""
        self._requests.close()
        self._process.wait()


def can_fork(command: list[str]) -> bool:
    """Whether a fork can stand for `command`: Python with a script, a module or code, on a machine without a GPU.

    A process that has looked for its GPUs cannot be forked.
    """
    is_python = command[0] == sys.executable and (command[1] in ("-c", "-m", "-u") or not command[1].startswith("-"))
    return is_python and sys.platform == "linux" and not any(driver.exists() for driver in GPU_DRIVERS)


def start_forked(command: list[str], environment: dict[str, str], cwd: Path, text: str = "") -> ForkedProcess:
    """Start `command` by a fork of the server for such an environment, which is started where there is none."""
    environment = dict(environment)
    if (tunables := malloc_tunables(environment)) is not None:
        environment[VARIABLE] = tunables  # the scripts would restart for it
    read_early = {name: value for name, value in environment.items() if not name.startswith(READ_LATE)}
    key = frozenset(read_early.items())
    if key not in _servers:
        _servers[key] = ForkServer(read_early)
    return _servers[key].start(command, environment, cwd, text)


def close_servers() -> None:
    """End every server of this process."""
    while _servers:
        _servers.popitem()[1].close()
