"""A Slurm cluster of several nodes on one machine, so that what we say of SLURM is seen and not believed.

    python -m tests.slurm.cluster up FOLDER [NODES]     # then: export SLURM_CONF=FOLDER/etc/slurm.conf
    python -m tests.slurm.cluster down FOLDER

One munged, one slurmctld and one slurmd a node are real. A node is a set of Linux namespaces (network, host name,
mounts, IPC, processes) on a bridge, so it can lose its power or its cable. Its hardware is pretended: a GPU is a device
like /dev/null. The file system is the host's and all nodes share it, as a cluster shares its scratch. Needs root and
Debian's slurm-wlm, munge, iproute2; tried with Slurm 22.05.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CONFIGURATION = """\
ClusterName={tag}
SlurmctldHost=control({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again; Slurm's default is 120 s
AuthInfo=socket={root}/munge.socket,cred_expire=5
# with NoInAddrAny an srun on the host would listen on 127.0.0.1, where no node reaches it
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=10
OverTimeLimit=0
InactiveLimit=0
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobs.log
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

# the first process of a node: it makes the node's own view of the machine, and then reaps orphans as an init does
NODE_INIT = """
hostname {name}
mount --bind {root}/etc/hosts /etc/hosts || exit 1
mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 1
export SLURM_CONF={root}/etc/slurm.conf
cd /
slurmd -D -N {name} &
while :; do wait; sleep 0.5; done
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge iproute2)" if absent else None


class Cluster:
    """Nodes node1, node2, ... under one controller.

    Args:
        root: of its state, logs and configuration; its name makes the addresses and the names of links.
        nodes: how many.
        cpus, gpus: pretended, of each node.
        grace_seconds: between a preemption's TERM and its end.
    """

    def __init__(self, root: Path, nodes: int = 2, *, cpus: int = 32, gpus: int = 8, grace_seconds: int = 60) -> None:
        self.root = root.resolve()
        number = zlib.crc32(str(self.root).encode())
        self.tag = f"s{number % 0xFFFF:04x}"
        self.net = f"10.{100 + number % 100}.{number // 100 % 250}"
        self.names = [f"node{i + 1}" for i in range(nodes)]
        self.cpus, self.gpus, self.grace_seconds = cpus, gpus, grace_seconds
        self._running: dict[str, tuple[int, str | None]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def up(self, seconds: float = 60) -> None:
        """Bring everything up and wait until all nodes are idle.

        Raises:
            RuntimeError: they are not, with the ends of all logs.
        """
        for folder in ("etc", "log", "state", "spool", "dev"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        self._configure()
        _do(f"ip link add {self.tag}b type bridge")
        _do(f"ip addr add {self.net}.1/24 dev {self.tag}b")
        _do(f"ip link set {self.tag}b up")
        for number, name in enumerate(self.names, start=1):
            space = f"{self.tag}-{name}"
            _do(f"ip netns add {space}")
            _do(f"ip link add {self._cable(name)} type veth peer name eth0 netns {space}")
            _do(f"ip link set {self._cable(name)} master {self.tag}b up")
            _do(f"ip -n {space} link set lo up")
            _do(f"ip -n {space} addr add {self.net}.{10 + number}/24 dev eth0")
            _do(f"ip -n {space} link set eth0 up")
        munge = f"munged --foreground --key-file={self.root}/etc/munge.key --socket={self.root}/munge.socket"
        munge += f" --pid-file={self.root}/munged.pid --log-file={self.root}/log/munged.log"
        self._start("munged", f"{munge} --seed-file={self.root}/munge.seed")
        control = f"hostname control; mount --bind {self.root}/etc/hosts /etc/hosts; cd /; exec slurmctld -D"
        self._start("slurmctld", ["unshare", "--uts", "--mount", "bash", "-c", control])
        for name in self.names:
            self._boot(name)
        deadline = time.monotonic() + seconds
        while self.states().count("idle") < len(self.names):
            if time.monotonic() > deadline:
                logs = "".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in (self.root / "log").glob("*.log"))
                self.down()
                raise RuntimeError(f"the cluster is not up: {logs}")
            time.sleep(0.2)

    def down(self) -> None:
        """End its processes and remove its network; logs stay."""
        self._read()
        for name in reversed(list(self._running)):
            self._kill(name)
        for name in self.names:
            subprocess.run(["ip", "link", "del", self._cable(name)], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{name}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self.tag}b"], capture_output=True, check=False)

    def states(self) -> list[str]:
        """Of the nodes, as sinfo says them."""
        command = ["sinfo", "-h", "-p", "main", "-N", "-o", "%T"]
        told = subprocess.run(command, capture_output=True, text=True, env=self._environment(), check=False)
        return told.stdout.split()

    # ---- accidents ----

    def cut(self, name: str) -> None:
        """Pull the node's network cable; its processes run on."""
        _do(f"ip link set {self._cable(name)} down")

    def heal(self, name: str) -> None:
        """Put the cable back."""
        _do(f"ip link set {self._cable(name)} up")

    def kill(self, name: str, *, silently: bool = True) -> None:
        """All processes of the node die at once; `silently`: and no peer hears of it, as when its power is lost."""
        if silently:
            self.cut(name)
        self._kill(name)

    def boot(self, name: str) -> None:
        """Start a node again."""
        self.heal(name)
        self._boot(name)

    # ---- parts ----

    def _configure(self) -> None:
        etc = self.root / "etc"
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "munge.key").chmod(0o400)
        addresses = {name: f"{self.net}.{11 + i}" for i, name in enumerate(self.names)}
        hosts = {"localhost": "127.0.0.1", "control": f"{self.net}.1", **addresses}
        (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        devices = [self.root / "dev" / f"gpu{i}" for i in range(self.gpus)]
        for device in devices:
            if not device.exists():
                os.mknod(device, 0o20666, os.makedev(1, 3))
        (etc / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        hardware = f"CPUs={self.cpus} RealMemory=64000 Gres=gpu:{self.gpus} State=UNKNOWN"
        lines = [f"NodeName={name} NodeAddr={address} {hardware}" for name, address in addresses.items()]
        text = CONFIGURATION.format(
            tag=self.tag, net=self.net, root=self.root, nodes="\n".join(lines), grace=self.grace_seconds
        )
        (etc / "slurm.conf").write_text(text)

    def _cable(self, name: str) -> str:
        return f"{self.tag}v{name.removeprefix('node')}"

    def _environment(self) -> dict[str, str]:
        return {"PATH": SYSTEM_PATH, "HOME": "/root", "LANG": "C.UTF-8", **self.environment}

    def _boot(self, name: str) -> None:
        space = ["nsenter", f"--net=/run/netns/{self.tag}-{name}", "unshare", "--uts", "--mount", "--ipc", "--pid"]
        init = NODE_INIT.format(name=name, root=self.root)
        self._start(name, [*space, "--fork", "--mount-proc", "--kill-child=KILL", "bash", "-c", init])

    def _start(self, name: str, command: str | list[str]) -> None:
        words = command.split() if isinstance(command, str) else command
        with (self.root / "log" / f"{name}.out").open("a") as out:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment(), start_new_session=True
            )
        self._running[name] = (process.pid, _started(process.pid))
        (self.root / "processes.json").write_text(json.dumps(self._running))

    def _read(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            written = json.loads((self.root / "processes.json").read_text())
            self._running = {name: (pid, since) for name, (pid, since) in written.items()} | self._running
        self.names = sorted({*self.names, *(name for name in self._running if name.startswith("node"))})

    def _kill(self, name: str) -> None:
        process, since = self._running.pop(name, (0, None))
        if since is None or _started(process) != since:  # gone, or its number is another's by now
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(process, signal.SIGKILL)  # the namespace's first process dies too, and all others with that
            os.waitpid(process, 0)


def _started(process: int) -> str | None:
    """When a process began, in the kernel's ticks; None where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _do(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


if __name__ == "__main__":
    one = Cluster(Path(sys.argv[2]), int((sys.argv[3:] or ["2"])[0]))
    one.up() if sys.argv[1] == "up" else one.down()
