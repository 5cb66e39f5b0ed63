"""Ranks that do not find each other are named, with the address at which they were looked for."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from datetime import timedelta

import pytest
from tests.launching import start_command
from torch.distributed import HashStore, TCPStore

from isotune.distributed.rendezvous import NetworkInterface, Rendezvous

PAIR = """
import os, sys, torch.distributed as dist
from isotune.distributed.rendezvous import rendezvous
from datetime import timedelta
if sys.argv[1] == "late":
    import time; time.sleep(300)
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
with rendezvous():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
print("met", dist.get_world_size(), flush=True)
dist.destroy_process_group()  # whose threads may otherwise outlive the interpreter, which then aborts
"""


@pytest.fixture
def _short_connections(monkeypatch):
    """An address that answers nothing is given up soon."""
    monkeypatch.setattr("isotune.distributed.rendezvous.CONNECT_TIMEOUT_SECONDS", 0.2)


def hold(store, rank: int, host: str, address: str, port: int) -> None:
    store.set(f"isotune/endpoint/{rank}", json.dumps({"host": host, "address": address, "port": port}))
    store.add("isotune/joined", 1)


def sentence(store, **more) -> str:
    """What a meeting of three says in rank 0 before it ends, when it waits for a tenth of a second."""
    ended, said = threading.Event(), []
    settings = {"rank": 0, "world_size": 3, "timeout_seconds": 0.1, "interface": NetworkInterface()} | more
    with Rendezvous(lambda: store, **settings, on_timeout=lambda text: (said.append(text), ended.set())):
        assert ended.wait(20)
    return said[0]


@pytest.mark.usefixtures("_short_connections")
def test_a_rank_that_did_not_come_and_one_out_of_reach_are_named_with_host_and_address(capsys):
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    hold(store, 1, "far", "192.0.2.7", port)  # TEST-NET-1 of RFC 5737: nobody's
    said = sentence(store)
    assert re.match(r"not all ranks have joined within 0.1 s \(rendezvous_timeout\): rank 2 did not join; ", said)
    assert re.match(r"note        not all ranks have joined after \d+ s: rank 2 did not join", capsys.readouterr().out)
    assert f"rank 1 on far (192.0.2.7) cannot be reached from rank 0 on {socket.gethostname()}" in said
    assert said.endswith("name the interface that connects the nodes in GLOO_SOCKET_IFNAME")


@pytest.mark.usefixtures("_short_connections")
def test_on_gpus_gloos_interface_is_named_beside_nccls():
    store = HashStore()
    hold(store, 1, "far", "192.0.2.7", 9)
    said = sentence(store, interface=NetworkInterface("NCCL_SOCKET_IFNAME"))
    assert said.endswith("name the interface that connects the nodes in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")


def test_an_address_that_only_its_own_host_can_use_is_out_of_reach():
    store = HashStore()
    hold(store, 1, "far", "127.0.0.1", 1)
    hold(store, 2, socket.gethostname(), "127.0.0.1", 1)
    said = sentence(store, interface=NetworkInterface(name="lo"))
    assert "rank 1 on far (127.0.0.1) cannot be reached from rank 0" in said and "rank 2" not in said
    assert "(127.0.0.1 of GLOO_SOCKET_IFNAME=lo)" in said


def test_where_everybody_answers_the_backend_is_to_blame():
    store = HashStore()
    with socket.create_server(("localhost", 0)) as other:
        for rank in (1, 2):
            hold(store, rank, f"host{rank}", "localhost", other.getsockname()[1])
        assert "all ranks can be reached from rank 0" in sentence(store)


def test_a_store_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("MASTER_PORT", "29500")

    def refuse():
        raise ConnectionError

    ended, said = threading.Event(), []
    settings = {"rank": 1, "world_size": 2, "timeout_seconds": 0.1, "interface": NetworkInterface()}
    with Rendezvous(refuse, **settings, on_timeout=lambda text: (said.append(text), ended.set())):
        assert ended.wait(20)
    assert "cannot connect to the launch's store at first:29500" in said[0]


def test_an_interface_has_the_address_that_it_has():
    assert NetworkInterface(name="lo").address == "127.0.0.1" and NetworkInterface(name="nothing").address == ""


@pytest.mark.parametrize("second", ["punctual", "late"])
def test_two_processes_meet_or_the_one_that_waits_ends_within_its_time(second):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "MEETING_SECONDS": "60" if second == "punctual" else "3",
    }
    ranks = [
        start_command([sys.executable, "-c", PAIR, how], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, how in enumerate(("punctual", second))
    ]
    try:
        out, errors = ranks[0].communicate(timeout=150)
        if second == "punctual":
            assert (ranks[0].returncode, out) == (0, "met 2\n"), errors
        else:
            assert ranks[0].returncode == 1
            assert re.match(r"note        not all ranks have joined after \d s: rank 1 did not", out)
            assert "error: not all ranks have joined within 3 s (rendezvous_timeout): rank 1 did not join" in errors
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.communicate()
