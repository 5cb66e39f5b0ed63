"""The first time that the ranks talk, somebody may not be there: say who, and at which address, instead of waiting.

Before the process group is made, every rank writes into the store of the launch where it is to be found, and listens
there. Who has not come within a minute is named, and waited for: starting can be slow. When all have come and the first
all-reduce has not come through a minute later, each rank tries the others' addresses itself, and ends with a sentence.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from isotune.io.errors import EXIT_FAULT, RunFault, UserError
from isotune.io.job_status import write_job_status

SECONDS_VARIABLE = "MEETING_SECONDS"
DEFAULT_SECONDS = 60.0
PATIENT_TIMES = 10  # so many times as long is waited for a rank that has not come
TRY_SECONDS = 3.0


@contextmanager
def rendezvous(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Make the process group in the body; after it one all-reduce shows that every rank is reached.

    Does nothing for a single rank, and nothing where the launcher gave no store.

    Raises:
        UserError: the port at which this rank should hold the launch's store is another program's.
        RunFault: the group could not be made, because ranks are out of reach, or the sum is wrong. Where nothing comes
            back in time the process ends itself, with the same sentence and status 1.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1 or "MASTER_ADDR" not in environment:
        yield
        return
    backend_variable = "NCCL_SOCKET_IFNAME" if torch.cuda.is_available() else "GLOO_SOCKET_IFNAME"
    meeting = Rendezvous(
        lambda: _open_store(environment),
        rank=int(environment["RANK"]),
        world_size=world_size,
        seconds=float(environment.get(SECONDS_VARIABLE) or DEFAULT_SECONDS),
        interface_variable=backend_variable,
        interface=environment.get(backend_variable, ""),
    )
    with meeting:
        try:
            yield
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
            total = torch.ones(1, device=device)
            dist.all_reduce(total)
            heard = int(total.item())
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):  # torch has no class of its own for it
                raise UserError(
                    f"MASTER_PORT {environment['MASTER_PORT']} is in use on {socket.gethostname()}, by another run or "
                    "program: give this launch a free port"
                ) from error
            if not meeting.out_of_reach():
                raise
            raise RunFault(f"{meeting.diagnosis()} [{str(error).splitlines()[0]}]") from error
    if heard != world_size:
        raise RunFault(f"the first all-reduce heard {heard} ranks, and the launch has {world_size}")


class Rendezvous:
    """Where a rank waits for the others, and looks for them when they do not come.

    Args:
        open_store: connects to the store that every rank reaches; called in a thread of the meeting's own.
        rank, world_size: of this launch.
        seconds: how long the first all-reduce may take, once all ranks have come.
        interface_variable, interface: how the user names the network interface of the backend, and what they named.
        end: what to do with the sentence when nothing came; prints it and leaves the process where not given.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        *,
        rank: int,
        world_size: int,
        seconds: float,
        interface_variable: str = "GLOO_SOCKET_IFNAME",
        interface: str = "",
        end: Callable[[str], Any] | None = None,
    ) -> None:
        self.rank, self.world_size, self.seconds = rank, world_size, seconds
        self.interface_variable, self.interface = interface_variable, interface
        self._open_store, self._end = open_store, end or _leave
        self._met = threading.Event()
        self._store: Store | None = None
        self._listener = socket.create_server(("", 0))

    def __enter__(self) -> "Rendezvous":
        threading.Thread(target=self._watch, name="first-contact", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._met.set()
        self._listener.close()

    def _watch(self) -> None:
        with suppress(Exception):  # without a store all that can be said is that there is none
            store = self._open_store()
            place = {
                "host": socket.gethostname(),
                "address": address_of(self.interface),
                "port": self._listener.getsockname()[1],
            }
            store.set(f"isotune/place/{self.rank}", json.dumps(place))
            self._store = store
        begun = time.monotonic()
        complete = None  # since when all are there
        notes = 0
        while not self._met.wait(min(1.0, self.seconds / 10)):
            waited = time.monotonic() - begun
            if complete is None and self._store is not None and not self._missing(self._store):
                complete = time.monotonic()
            if complete is not None and time.monotonic() - complete > self.seconds:
                self._end(f"the first all-reduce did not come through in {self.seconds:g} s: {self.diagnosis()}")
                return
            if complete is None and waited > PATIENT_TIMES * self.seconds:
                self._end(f"not all ranks are there after {waited:.0f} s: {self.diagnosis()}")
                return
            if complete is None and waited > (notes + 1) * self.seconds:
                notes += 1
                print(f"note        not all ranks are there after {waited:.0f} s: {self.diagnosis()}", flush=True)

    def _missing(self, store: Store) -> list[str]:
        return [str(rank) for rank in range(self.world_size) if not store.check([f"isotune/place/{rank}"])]

    def diagnosis(self) -> str:
        """Who is missing, and who is out of reach of this rank, by host and address."""
        here = f"{socket.gethostname()} ({address_of(self.interface) or 'no address'}{self._as_named()})"
        if self._store is None:
            return f"rank {self.rank} on {here} does not reach the launch's store at {_store_address()}"
        missing, silent = self._missing(self._store), self.out_of_reach()
        said = []
        if missing:
            said.append(f"rank {' and '.join(missing)} did not come")
        if silent:
            said.append(f"{' and '.join(silent)} cannot be reached from rank {self.rank} on {here}")
        if not said:
            return f"all ranks can be reached from rank {self.rank} on {here} at other ports: {self._advice()}"
        return f"{'; '.join(said)}: {self._advice()}"

    def out_of_reach(self) -> list[str]:
        """The ranks that have come and do not answer this one, by host and address."""
        if self._store is None:
            return []
        silent = []
        for rank in range(self.world_size):
            if rank != self.rank and self._store.check([f"isotune/place/{rank}"]):
                place = json.loads(self._store.get(f"isotune/place/{rank}"))
                if not _answers(place):
                    silent.append(f"rank {rank} on {place['host']} ({place['address']})")
        return silent

    def _as_named(self) -> str:
        return f" of {self.interface_variable}={self.interface}" if self.interface else ""

    def _advice(self) -> str:
        return f"name the interface that connects the nodes in {self.interface_variable}"


def address_of(interface: str) -> str:
    """The IPv4 address of an interface, of none that is named the one that the host's name stands for; else empty."""
    if interface:
        name = interface.split(",")[0].lstrip("=^")
        found = [a.address for a in psutil.net_if_addrs().get(name, []) if a.family == socket.AF_INET]
        return found[0] if found else ""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _answers(place: Mapping[str, Any]) -> bool:
    if place["host"] == socket.gethostname():
        return True
    if not place["address"] or place["address"].startswith("127."):
        return False  # what answers there would be this host
    try:
        socket.create_connection((place["address"], place["port"]), timeout=TRY_SECONDS).close()
    except OSError:
        return False
    return True


def _open_store(environment: Mapping[str, str]) -> Store:
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=DEFAULT_SECONDS))


def _store_address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _leave(sentence: str) -> NoReturn:
    os.write(2, f"error: {sentence}\n".encode())
    write_job_status(status="failed", exit_status=EXIT_FAULT, message=sentence)
    os._exit(EXIT_FAULT)
