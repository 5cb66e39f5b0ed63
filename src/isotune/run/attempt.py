"""A life of a run: one start of its processes, from which machine, by which job; and whether it still goes on."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """Who holds, or held, a run folder.

    Attributes:
        host, machine: name of the machine, and what tells one boot of it and one container on it from another.
        pid, started: the main process; a number is used again, but not with the same start.
        job, restart: SLURM's number and how often it was requeued; None off SLURM.
    """

    host: str
    machine: str
    pid: int
    started: str | None
    job: str | None
    restart: int | None

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> "Attempt":
        """The one that this process leads."""
        host = socket.gethostname()
        job = environment.get("SLURM_JOB_ID")
        restart = int(environment.get("SLURM_RESTART_COUNT") or 0) if job else None
        return cls(host, _machine(host), os.getpid(), _started(os.getpid()), job, restart)

    @classmethod
    def read(cls, file: Path) -> "Attempt | None":
        """What `as_dict` wrote; None where it is absent or broken."""
        try:
            said = json.loads(file.read_text("utf-8"))
            return cls(**{name: said[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def is_here(self) -> bool:
        """Whether its process could be seen from this one."""
        return self.machine == _machine(socket.gethostname())

    @property
    def runs(self) -> bool:
        """Whether its process is there; only of use where it `is_here`."""
        return self.started is not None and _started(self.pid) == self.started

    def __str__(self) -> str:
        job = f" (SLURM job {self.job}, restart {self.restart})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def slurm_ids(environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Which job, and which life of it, this process belongs to; None off SLURM."""
    if "SLURM_JOB_ID" not in environment:
        return None
    wanted = {
        "job_id": "SLURM_JOB_ID",
        "job_name": "SLURM_JOB_NAME",
        "partition": "SLURM_JOB_PARTITION",
        "nodes": "SLURM_JOB_NODELIST",
        "array_job_id": "SLURM_ARRAY_JOB_ID",
        "array_task_id": "SLURM_ARRAY_TASK_ID",
    }
    found: dict[str, Any] = {key: environment[name] for key, name in wanted.items() if name in environment}
    return {**found, "restart": int(environment.get("SLURM_RESTART_COUNT") or 0)}


def _machine(host: str) -> str:
    parts = [host]
    for read in (_boot, _process_space):
        try:
            parts.append(read())
        except OSError:  # no Linux: the name alone has to do
            parts.append("")
    return " ".join(parts)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process_space() -> str:
    return os.readlink("/proc/self/ns/pid")


def _started(process: int) -> str | None:
    """When a process began, in the kernel's ticks; None where it is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if os.path.isdir("/proc/self"):
            return None
        return _started_elsewhere(process)
    return None if fields[0] in "ZX" else fields[19]


def _started_elsewhere(process: int) -> str | None:
    """As `_started` on systems without /proc, where all that can be asked is whether there is such a process."""
    try:
        os.kill(process, 0)
    except OSError:
        return None
    return "unknown"
