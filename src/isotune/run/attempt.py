"""An attempt is one start of a run's processes: on which machine, by which job, and whether it is still running."""

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLURM_VARIABLES = {
    "job_id": "SLURM_JOB_ID",
    "job_name": "SLURM_JOB_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "nodes": "SLURM_JOB_NODELIST",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
}


@dataclass(frozen=True)
class Attempt:
    """Identity of an attempt, as RunLease records it.

    Attributes:
        machine: host name, boot id and pid namespace; equal only where one process could see the other.
        pid: of the main process.
        started: start time of that process in kernel ticks. Pids are reused, a pid with its start time is not.
        job, restart: SLURM job id and requeue count; None off SLURM.
    """

    host: str
    machine: str
    pid: int
    started: str | None
    job: str | None
    restart: int | None

    @classmethod
    def current(cls) -> "Attempt":
        """The attempt whose main process is this one."""
        host, job = socket.gethostname(), os.environ.get("SLURM_JOB_ID")
        restart = _restart_count() if job else None
        return cls(host, _machine_id(host), os.getpid(), _start_time(os.getpid()), job, restart)

    @classmethod
    def read(cls, file: Path) -> "Attempt | None":
        """Read the record of an attempt; None where the file is missing or broken."""
        try:
            record = json.loads(file.read_text("utf-8"))
            return cls(**{name: record[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_of_same_job(self, other: "Attempt") -> bool:
        """Whether both are attempts of one SLURM job, before and after a requeue."""
        return self.job is not None and self.job == other.job and self.restart != other.restart

    @property
    def is_local(self) -> bool:
        """Whether its process is visible from this one."""
        return self.machine == _machine_id(socket.gethostname())

    @property
    def is_running(self) -> bool:
        """Whether its process exists; meaningful only where `is_local`."""
        return self.started is not None and _start_time(self.pid) == self.started

    def __str__(self) -> str:
        job = f" (SLURM job {self.job}, restart {self.restart})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def slurm_ids() -> dict[str, Any] | None:
    """SLURM's ids of this attempt, for environment.json and status.json; None off SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    ids = {key: os.environ[name] for key, name in SLURM_VARIABLES.items() if name in os.environ}
    return {**ids, "restart": _restart_count()}


def _restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)  # unset in a job's first attempt


def _machine_id(host: str) -> str:
    parts = [host, "", ""]
    with contextlib.suppress(OSError):  # not Linux: the host name has to be enough
        parts[1] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        parts[2] = os.readlink("/proc/self/ns/pid")
    return " ".join(parts)


def _start_time(pid: int) -> str | None:
    """Start time of a process in kernel ticks; None where it is gone or a zombie, "unknown" without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if os.path.isdir("/proc/self"):
            return None
    else:
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "unknown"
