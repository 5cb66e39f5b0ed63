"""Where the tests find real public data, and how they skip where it is absent."""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.forking import close_servers

if TYPE_CHECKING:
    from tests.hub_stand_in.server import HubStandIn

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("ISOTUNE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def pytest_configure() -> None:
    """No collection of garbage while tests are collected: a million objects come, which stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Pass over the objects of the imported libraries in every later collection: a training run makes several."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data slices, tokenizers and the small trained model."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}: set ISOTUNE_TEST_DATA to a folder that has it")
    return SHARED_DATA


@pytest.fixture(scope="module")
def hub() -> Iterator["HubStandIn"]:
    """A stand-in of the Hub with every repository that a default recipe names."""
    from tests.hub_stand_in import repositories
    from tests.hub_stand_in.server import HubStandIn

    server = HubStandIn()
    repositories.stock(server)
    yield server
    server.shutdown()


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Iterator[Path]:
    """Folders without end for the caches: pytest's own numbering would list all of them for each."""
    folder = tmp_path_factory.mktemp("caches")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def private_cache(caches, monkeypatch) -> Path:
    """Prepared data of a test goes to a folder of its own, never to the user's cache."""
    folder = next(caches)
    folder.mkdir()
    monkeypatch.setenv("ISOTUNE_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """What the code under test sets in this process's environment ends with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def fork_servers() -> Iterator[None]:
    """The processes that scripts were forked from end with the tests."""
    yield
    close_servers()
