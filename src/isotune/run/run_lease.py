"""The lease on a run directory: of several attempts at one run, only the newest may write.

SLURM can requeue a job while its previous attempt still runs on a node whose network was cut. So every attempt has a
directory of its own, RUN/.lives/NUMBER-..., and publishes files only by renaming them out of it. A new attempt first
renames the directory of the previous one, and from then on every rename of the previous attempt fails, at whatever
point it was. This needs neither synchronised clocks nor file locks.

A requeued attempt replaces the earlier attempts of its own job. Otherwise a run directory in use is refused with the
name of its holder: a holder on this machine is looked up by its pid, one on another machine must update its heartbeat
within `WATCH_SECONDS`.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isotune.io.errors import Superseded, UserError, end_process, outcome_of
from isotune.io.files import replace_file, write_synced
from isotune.io.run_files import or_empty, read_attempt

# Names on disk. They are older than the word "attempt" and stay: run directories outlive versions.
ATTEMPTS_DIR = ".lives"
ATTEMPT_RECORD, HEARTBEAT = "life.json", "heartbeat"
ENDED_SUFFIX = ".over"
RESERVE, RESERVED_BYTES = "reserve", 2**16
BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0  # six heartbeats, and longer than a network file system shows an old file
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
    """An attempt is one start of a run's processes: on which machine and by which job, as the lease records it."""

    host: str
    machine: str  # host name, boot id and pid namespace; equal only where one process could see the other
    pid: int  # of the main process
    started: str | None  # that process's, in kernel ticks: pids are reused, a pid with its start time is not
    job: str | None  # SLURM's id; None off SLURM
    restart: int | None  # requeue count

    @classmethod
    def current(cls) -> "Attempt":
        """The attempt whose main process is this one."""
        host, job = socket.gethostname(), os.environ.get("SLURM_JOB_ID")
        restart = _restart_count() if job else None
        return cls(host, _machine_id(host), os.getpid(), _start_time(os.getpid()), job, restart)

    @classmethod
    def read(cls, file: Path) -> "Attempt | None":
        """Read the record of an attempt; None where the file is missing or broken."""
        record = or_empty(read_attempt, file)
        if not cls.__dataclass_fields__.keys() <= record.keys():
            return None
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

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


class RunLease:
    """The right to write to a run directory, as one process sees it.

    `run` need not exist. `end` is called with a message when another attempt has taken the lease or RUN is gone; by
    default it prints it and exits the process. `folder` is the directory of this attempt, None while it does not hold
    the lease.
    """

    def __init__(self, run: Path, end: Callable[[str], object] | None = None) -> None:
        self.run, self.attempts = run, run / ATTEMPTS_DIR
        self.folder: Path | None = None
        self._end = end
        self._known_stale: set[str] = set()
        self._released = threading.Event()

    def check_available(self) -> None:
        """Check that this process may acquire the lease. Changes nothing; can take `WATCH_SECONDS`.

        UserError names another attempt that is running; Superseded where it is a later one of the same job.
        """
        for folder in self.active():
            if folder.name not in self._known_stale and folder != self.folder:
                self._check_stale(folder, Attempt.read(folder / ATTEMPT_RECORD))
                self._known_stale.add(folder.name)

    def acquire(self, **record: object) -> Path:
        """Become the newest attempt and revoke all others; returns the directory of this attempt, which has `record`.

        What earlier attempts left half written is removed.

        Raises as `check_available` does, and UserError where the directory cannot be written.
        """
        self.check_available()
        try:
            self.folder = self._register({**asdict(Attempt.current()), "began": time.time(), **record})
            for other in self.active():
                if other.name > self.folder.name:
                    self.release()
                    raise self._superseded()
                if other != self.folder:
                    _revoke(other)
            for ended in self.attempts.glob(f"*{ENDED_SUFFIX}"):
                _clear(ended)
        except OSError as error:
            raise UserError(f"output_dir '{self.run}' cannot be written: {error.strerror}") from error
        threading.Thread(target=self._beat, args=(self.folder,), name="heartbeat", daemon=True).start()
        return self.folder

    def release(self) -> None:
        """Give up the lease, and remove the run directory where the run wrote nothing to it."""
        self._released.set()
        if self.folder is None:
            return
        self.free_reserve()
        with contextlib.suppress(OSError):
            record = or_empty(read_attempt, self.folder / ATTEMPT_RECORD)
            replace_file(self.folder / ATTEMPT_RECORD, json.dumps({**record, "ended": time.time()}, indent=2) + "\n")
        with contextlib.suppress(OSError):
            self.folder.rename(f"{self.folder}{ENDED_SUFFIX}")
            if [path.name for path in self.run.iterdir()] == [ATTEMPTS_DIR] and not self.active():
                shutil.rmtree(self.run)
        self.folder = None

    def check(self) -> None:
        """Raise Superseded where a later attempt has revoked this lease, and UserError where RUN is gone."""
        if self.folder is not None and not os.path.isdir(self.folder):  # false too where the disk is out of reach
            raise self._lost()

    def reserve(self) -> None:
        """Take room on the disk that `free_reserve` gives back, for the last words of a run whose disk is full."""
        if self.folder is not None:
            write_synced(self.folder / RESERVE, "." * RESERVED_BYTES)

    def free_reserve(self) -> bool:
        """Give the reserved room back; whether there was any."""
        try:
            (self.folder or self.run).joinpath(RESERVE).unlink()
        except OSError:
            return False
        return True

    def write_file(self, path: Path, text: str) -> None:
        """`replace_file`, for the newest attempt only; raises as `check` where this one cannot write any more."""
        if self.folder is None:
            replace_file(path, text)
            return
        try:
            replace_file(path, text, self.folder / path.name)
        except OSError:
            self.check()
            raise

    def active(self) -> list[Path]:
        """Directories of attempts that have not recorded their end, the oldest first."""
        try:
            folders = [path for path in self.attempts.iterdir() if not path.name.endswith(ENDED_SUFFIX)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(path for path in folders if path.name[0] != ".")

    def _register(self, record: dict[str, object]) -> Path:
        self.attempts.mkdir(parents=True, exist_ok=True)
        staging = self.attempts / f".{secrets.token_hex(8)}"
        staging.mkdir()
        write_synced(staging / ATTEMPT_RECORD, json.dumps(record, indent=2) + "\n")
        names = [path.name[:8] for path in self.attempts.iterdir()]
        newest = max((int(name) for name in names if name.isascii() and name.isdecimal()), default=0)
        folder = self.attempts / f"{newest + 1:08d}-{secrets.token_hex(4)}"  # unique: no name is ever used twice
        staging.rename(folder)
        return folder

    def _check_stale(self, folder: Path, holder: Attempt | None) -> None:
        """Return where the attempt in `folder` is stale, so that this process may take its place."""
        current = Attempt.current()
        if holder is not None and holder.is_of_same_job(current):
            if (holder.restart or 0) > (current.restart or 0):
                raise Superseded(f"{self.run} is held by a later attempt of this job: {holder}; this one is stale")
            return
        if holder is not None and holder.is_local:
            if holder.is_running:
                raise self._in_use(holder)
            return
        before, deadline = _read_heartbeat(folder), time.monotonic() + WATCH_SECONDS
        print(
            f"note        {self.run} was held by {holder}: watching its heartbeat for {WATCH_SECONDS:g} s", flush=True
        )
        while time.monotonic() < deadline:
            time.sleep(1)
            if _read_heartbeat(folder) != before:
                raise self._in_use(holder)

    def _in_use(self, holder: Attempt | None) -> UserError:
        return UserError(f"output_dir '{self.run}' is in use by {holder}: wait for it, stop it, or choose another")

    def _lost(self) -> Superseded | UserError:
        """Why this attempt has no lease any more."""
        if not os.path.isdir(self.run):
            return UserError(f"output_dir '{self.run}' is gone: it was removed, or its disk went away, during the run")
        return self._superseded()

    def _superseded(self) -> Superseded:
        active = self.active()
        newest = active and Attempt.read(active[-1] / ATTEMPT_RECORD)
        return Superseded(
            f"{self.run} was taken over by {newest or 'another attempt'}: a stale attempt can no longer write, "
            "so this one ends"
        )

    def _beat(self, folder: Path) -> None:
        """Update the heartbeat until the lease is released, and end the process once it is revoked."""
        beats = 0
        while not self._released.wait(BEAT_SECONDS if beats else 0):
            beats += 1
            try:
                with (folder / HEARTBEAT).open("w") as file:
                    file.write(f"{beats} {time.time()}\n")
            except FileNotFoundError:
                if not self._released.is_set() and not os.path.isdir(folder):
                    lost = self._lost()
                    if self._end is None:
                        end_process(str(lost), *outcome_of(lost))
                    self._end(str(lost))
                    return
            except OSError:  # a full disk or a file system out of reach: whoever needs to write reports it
                continue


def _revoke(folder: Path) -> None:
    """Take the directory of an attempt away by one rename; what it had half written goes too."""
    ended = folder.with_name(f"{folder.name}{ENDED_SUFFIX}")
    with contextlib.suppress(FileNotFoundError):  # that attempt ended at this very moment
        folder.rename(ended)
    _clear(ended)


def _clear(ended: Path) -> None:
    """Delete what an attempt had half written: one that gave its lease up may have left a checkpoint too."""
    (ended / RESERVE).unlink(missing_ok=True)
    for path in ended.glob("*") if ended.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _read_heartbeat(folder: Path) -> str:
    try:
        return (folder / HEARTBEAT).read_text()
    except OSError:
        return ""


def last_heartbeat(folder: Path) -> float | None:
    """Time of an attempt's last heartbeat, in seconds since 1970 by its own clock; None where there was none."""
    try:
        return float(_read_heartbeat(folder).split()[1])
    except (ValueError, IndexError):
        return None


def holder_is_alive(run: Path) -> bool:
    """Whether an attempt at the run goes on, without waiting: its process on this machine, its heartbeat on another.

    A heartbeat counts for `WATCH_SECONDS`, by the clock of the file system's own times.
    """
    for folder in RunLease(run).active():
        holder = Attempt.read(folder / ATTEMPT_RECORD)
        if holder is not None and holder.is_local:
            if holder.is_running:
                return True
        else:
            with contextlib.suppress(OSError):
                if time.time() - (folder / HEARTBEAT).stat().st_mtime < WATCH_SECONDS:
                    return True
    return False


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
