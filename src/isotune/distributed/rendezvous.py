"""Create the process group, and name the ranks that are missing or unreachable instead of waiting without a message.

Before the process group is created, every rank publishes its host, address and port in the launch's store and listens
there. A rank that has not joined after half of `rendezvous_timeout` is named, and after all of it the others end. Once
all ranks have joined, the first all-reduce has the same time to finish. If it does not, each rank tries to connect to
the others, and the process ends with one sentence that names the unreachable ranks.

`torch.distributed.monitored_barrier` cannot replace this: it needs a finished process group of gloo, which a missing or
unreachable rank prevents, and names ranks without hosts or addresses, on rank 0 only.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]  (not exported)

from isotune.io.errors import RunFault, UserError, end_process
from isotune.io.parent_process import is_launched, signal_when_parent_ends

TIMEOUT_VARIABLE = "MEETING_SECONDS"
DEFAULT_TIMEOUT_SECONDS = 120.0
CONNECT_TIMEOUT_SECONDS = 3.0
LAUNCHER_SECONDS = 30.0  # in which a launcher that ends has ended its ranks


@dataclass(frozen=True)
class NetworkInterface:
    """The backend's environment variable for its network interface, and the value that the user gave it."""

    variable: str = "GLOO_SOCKET_IFNAME"
    name: str = ""

    @property
    def variables(self) -> str:
        """All that have to name it: gloo's too on GPUs, over which the ranks agree on a checkpoint."""
        return self.variable if self.variable == "GLOO_SOCKET_IFNAME" else f"{self.variable} and GLOO_SOCKET_IFNAME"

    @property
    def address(self) -> str:
        """Its IPv4 address; without a name the address of this host's own name; empty where there is none."""
        if self.name:
            interface = self.name.split(",")[0].lstrip("=^")
            addresses = psutil.net_if_addrs().get(interface, [])
            return next((a.address for a in addresses if a.family == socket.AF_INET), "")
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            return ""


@contextmanager
def rendezvous(timeout_seconds: float | None = None, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Create the process group in the body of this context; one all-reduce after it shows that all ranks are connected.

    `timeout_seconds` is the recipe's; without it MEETING_SECONDS counts, else DEFAULT_TIMEOUT_SECONDS. Does nothing
    for a single rank or where the launcher provides no store. UserError where another program uses the port on which
    this rank must serve the store; RunFault where ranks are unreachable or the all-reduce is wrong. On a timeout the
    process prints the same sentence and exits with status 1.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1 or "MASTER_ADDR" not in environment:
        yield
        return
    if is_launched() and signal_when_parent_ends():  # nothing is to be saved yet: the signal ends it in any call
        raise RunFault("the launcher ended before this rank had begun")
    variable = "NCCL_SOCKET_IFNAME" if torch.cuda.is_available() else "GLOO_SOCKET_IFNAME"
    seconds = timeout_seconds or float(environment.get(TIMEOUT_VARIABLE) or DEFAULT_TIMEOUT_SECONDS)
    address, patience = environment["MASTER_ADDR"], timedelta(seconds=seconds)
    meeting = Rendezvous(
        lambda: TCPStore(address, int(environment["MASTER_PORT"]), is_master=False, timeout=patience),
        rank=int(environment["RANK"]),
        world_size=world_size,
        timeout_seconds=seconds,
        interface=NetworkInterface(variable, environment.get(variable, "")),
    )
    _require_store(environment)
    with meeting:
        try:
            yield
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
            dist.all_reduce(total := torch.ones(1, device=device))
            summed_ranks = int(total.item())
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):  # torch has no exception class for it
                raise UserError(
                    f"MASTER_PORT {environment['MASTER_PORT']} is in use on {socket.gethostname()}, by another run or "
                    "program: give this launch a free port"
                ) from error
            if not meeting.unreachable_ranks():
                raise
            raise RunFault(f"{meeting.diagnosis()} [{str(error).splitlines()[0]}]") from error
    if summed_ranks != world_size:
        raise RunFault(f"the first all-reduce summed {summed_ranks} ranks, and the launch has {world_size}")


def _require_store(environment: Mapping[str, str]) -> None:
    """RunFault where the launcher that serves the store was killed while this rank was imported.

    Such a launcher serves it before it starts a rank, and to connect to a dead one takes minutes. Only a refused
    connection counts: thousands of ranks that come at once may wait for theirs.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_SECONDS).close()
    except ConnectionRefusedError:
        here = f"rank {environment['RANK']} on {socket.gethostname()}"
        raise RunFault(f"{here}: nothing serves the launch's store: its launcher was killed") from None
    except OSError:  # for the rendezvous to say
        return


@dataclass(eq=False)
class Rendezvous:
    """Watches from a thread whether all ranks join and reach each other, and diagnoses which do not."""

    open_store: Callable[[], Store]  # connects to the store of the launch; called in the thread
    _: KW_ONLY
    rank: int
    world_size: int
    timeout_seconds: float  # to join, and once more for the first all-reduce
    interface: NetworkInterface  # of the backend
    on_timeout: Callable[[str], Any] = field(default=partial(end_process, status="failed"))  # takes the diagnosis
    _connected: threading.Event = field(default_factory=threading.Event, init=False)
    _store: Store | None = field(default=None, init=False)
    _listener: socket.socket = field(default_factory=lambda: socket.create_server(("", 0)), init=False)

    def __enter__(self) -> "Rendezvous":
        threading.Thread(target=self._watch, name="rendezvous", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._connected.set()
        self._listener.close()

    def _watch(self) -> None:
        started = time.monotonic()
        with suppress(Exception):  # without a store the diagnosis says that it is unreachable
            store = self.open_store()
            port = self._listener.getsockname()[1]
            endpoint = {"host": socket.gethostname(), "address": self.interface.address, "port": port}
            store.set(_key(self.rank), json.dumps(endpoint))
            store.add(_JOINED, 1)
            self._store = store
        try:
            self._wait_for_ranks(started)
        except RuntimeError:  # the store has gone with the launcher, which ends this process too, unless it was killed
            if not self._connected.wait(LAUNCHER_SECONDS):
                here = f"rank {self.rank} on {socket.gethostname()}"
                self.on_timeout(f"{here} lost its launch before all ranks met: the launcher was killed or is cut off")

    def _wait_for_ranks(self, started: float) -> None:
        all_joined_at = None
        is_noted = False
        while not self._connected.wait(min(1.0, self.timeout_seconds / 10)):
            now = time.monotonic()
            if all_joined_at is None and self._store is not None and self._store.add(_JOINED, 0) >= self.world_size:
                all_joined_at = now
            if all_joined_at is not None:
                if now - all_joined_at > self.timeout_seconds:
                    limit = f"{self.timeout_seconds:g} s"
                    self.on_timeout(f"the first all-reduce did not finish within {limit}: {self.diagnosis()}")
                    return
                continue
            waited = now - started
            if waited > self.timeout_seconds:
                limit = f"{self.timeout_seconds:g} s (rendezvous_timeout)"
                self.on_timeout(f"not all ranks have joined within {limit}: {self.diagnosis()}")
                return
            if waited > self.timeout_seconds / 2 and not is_noted:
                is_noted = True
                if self._store is None or self._store.add(_NOTED, 1) == 1:  # one of them says it
                    print(f"note        not all ranks have joined after {waited:.0f} s: {self.diagnosis()}", flush=True)

    def _missing_ranks(self) -> list[int]:
        return [rank for rank in range(self.world_size) if self._store and not self._store.check([_key(rank)])]

    def diagnosis(self) -> str:
        """Which ranks are missing and which are unreachable from this rank, by host and address."""
        name = f" of {self.interface.variable}={self.interface.name}" if self.interface.name else ""
        here = f"{socket.gethostname()} ({self.interface.address or 'no address'}{name})"
        advice = f"name the interface that connects the nodes in {self.interface.variables}"
        if self._store is None:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return f"rank {self.rank} on {here} cannot connect to the launch's store at {address}"
        parts = []
        if missing := self._missing_ranks():
            parts.append(f"rank {' and '.join(map(str, missing))} did not join")
        if unreachable := self.unreachable_ranks():
            parts.append(f"{' and '.join(unreachable)} cannot be reached from rank {self.rank} on {here}")
        if not parts:
            return f"all ranks can be reached from rank {self.rank} on {here} at other ports: {advice}"
        return f"{'; '.join(parts)}: {advice}"

    def unreachable_ranks(self) -> list[str]:
        """The ranks that have joined and accept no connection from this rank, by host and address."""
        if self._store is None:
            return []
        unreachable = []
        for rank in range(self.world_size):
            if rank != self.rank and self._store.check([_key(rank)]):
                endpoint = json.loads(self._store.get(_key(rank)))
                if not _accepts_connections(endpoint):
                    unreachable.append(f"rank {rank} on {endpoint['host']} ({endpoint['address']})")
        return unreachable


# how many ranks have joined, and how many have noted that some have not: asked instead of every rank's endpoint
_JOINED, _NOTED = "isotune/joined", "isotune/noted"


def _key(rank: int) -> str:
    return f"isotune/endpoint/{rank}"


def _accepts_connections(endpoint: Mapping[str, Any]) -> bool:
    if endpoint["host"] == socket.gethostname():
        return True
    if not endpoint["address"] or endpoint["address"].startswith("127."):
        return False  # a loopback address would connect to this host
    try:
        socket.create_connection((endpoint["address"], endpoint["port"]), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
