"""A tracker that cannot be written to is one sentence before anything is prepared."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from isotune.config.engine_keys import Tracker
from isotune.io.errors import UserError
from isotune.run import trackers
from isotune.run.trackers import PACKAGES, check_trackers


@pytest.fixture(autouse=True)
def all_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every package is there, nobody is logged in anywhere."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: SimpleNamespace())
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


def test_every_tracker_of_the_recipe_is_known_by_its_package():
    assert set(PACKAGES) == set(Tracker.__args__) - {"none", "all", "kubeflow"}  # kubeflow is told by its server


@pytest.mark.parametrize(("name", "command"), [("wandb", "pip install wandb"), ("comet_ml", "pip install comet-ml")])
def test_a_package_that_is_not_installed_is_named_with_its_command(name: str, command: str, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"report_to: {name} is not installed: {command}$"):
        check_trackers([name])
    check_trackers(["none"])
    check_trackers(["all"])


def test_wandb_needs_a_key_a_login_or_no_server(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="wandb has no key: run `wandb login`"):
        check_trackers(["wandb"])
    for name, value in (("WANDB_API_KEY", "k"), ("WANDB_MODE", "offline"), ("WANDB_IDENTITY_TOKEN_FILE", "f")):
        with monkeypatch.context() as within:
            within.setenv(name, value)
            check_trackers(["wandb"])
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(UserError, match="wandb has no key"):
        check_trackers(["wandb"])


def test_mlflow_needs_a_server_that_answers_or_a_folder_to_write_to(monkeypatch, tmp_path):
    check_trackers(["mlflow"])  # mlruns, here
    assert list(tmp_path.iterdir()) == []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
        with pytest.raises(UserError, match=f"mlflow's server 127.0.0.1:{port} does not answer") as refused:
            check_trackers(["mlflow"])
        assert "secret" not in str(refused.value)
        server.listen()
        check_trackers(["mlflow"])
    (tmp_path / "file").touch()
    for uri, works in (
        (str(tmp_path / "runs" / "of" / "mine"), True),
        (f"file://{tmp_path}", True),
        (f"sqlite:///{tmp_path}/mlflow.db", True),
        (f"sqlite:////{tmp_path}/file", True),
        (str(tmp_path / "file"), False),
        (f"file://{tmp_path}/file/below", False),
        (f"sqlite:////{tmp_path}/file/mlflow.db", False),
        ("databricks", True),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        if works:
            check_trackers(["mlflow"])
        else:
            with pytest.raises(UserError, match="mlflow cannot write to"):
                check_trackers(["mlflow"])
