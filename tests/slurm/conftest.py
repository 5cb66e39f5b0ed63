"""The cluster that the tests of this folder share, and how they skip where there can be none."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.launching import Finished, start
from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import EXACT, Site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses the cluster bears its mark."""
    reason = missing()
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"no Slurm cluster: {reason}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Site]:
    """Three nodes; up once for all tests of this process."""
    root = Path(tempfile.mkdtemp(prefix="isotune-slurm-"))
    one = Cluster(root, 3)
    one.up()
    yield Site(one)
    one.down()
    if keep := os.environ.get("ISOTUNE_KEEP_SLURM_LOGS"):
        shutil.copytree(root / "log", keep, dirs_exist_ok=True)
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def whole_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves every node idle and no job behind, however it ended."""
    yield
    if "cluster" not in request.fixturenames:
        return
    site: Any = request.getfixturevalue("cluster")
    site.ask("scancel", "--full", "--user=root", check=False)
    deadline = time.monotonic() + 90
    while site.cluster.states().count("idle") < len(site.cluster.names):
        assert time.monotonic() < deadline, site.ask("sinfo", "-N", "-l")
        time.sleep(0.3)


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Finished:
    """The recipe EXACT on one local process."""
    return start(tmp_path_factory.mktemp("plain"), EXACT, script="train/yelp.py")
