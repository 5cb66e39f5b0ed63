"""No process of a run outlives the one that started it: on Linux the kernel tells it when that one ends."""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def is_launched() -> bool:
    """Whether a launcher started this process, and with it the others of the run."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def signal_when_parent_ends() -> bool:
    """Ask for SIGTERM when the parent process ends, on Linux; whether it ended before the kernel was asked."""
    if not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    return os.getppid() != parent


def pass_on(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to a process; Windows can only end one, and its Ctrl+C reaches all processes of a console."""
    if sys.platform != "win32":
        process.send_signal(number)
    elif number != signal.SIGINT:
        process.terminate()
