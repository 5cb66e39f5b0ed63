"""Points the Hub's libraries at a stand-in: those of this process, which read their settings once, or a new process."""

import importlib
import sys
from pathlib import Path

import pytest

from isotune.data.sources.hub import forget
from tests.fork_server import HUB_SETTINGS
from tests.hub_stand_in.server import HubStandIn


def settings(hub: HubStandIn, folder: Path, **more: str) -> dict[str, str]:
    """The variables that a process sees whose Hub is `hub` and whose caches lie in `folder`."""
    caches = {"HF_HOME": str(folder / "huggingface"), "ISOTUNE_CACHE": str(folder / "isotune")}
    return {"HF_ENDPOINT": hub.url, **caches, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


class Client:
    """The libraries of this process, as a process would find them that started now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def start(self, hub: HubStandIn, folder: Path, **more: str) -> None:
        """Read settings anew, and forget what was opened and read."""
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            self._monkeypatch.delenv(name, raising=False)
        for name, value in settings(hub, folder, **more).items():
            self._monkeypatch.setenv(name, value)
        self.reload()

    @staticmethod
    def reload() -> None:
        """Let the libraries read the environment as it is."""
        for module in HUB_SETTINGS:
            importlib.import_module(module)
            importlib.reload(sys.modules[module])
        forget()
