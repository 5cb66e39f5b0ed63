"""Whether the trackers of `report_to` can be written to, asked before any data is prepared.

Trainer makes a tracker when training begins, and an error of it then is a traceback after all that went before.
"""

import netrc
import os
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from isotune.io.errors import UserError, first_line

# tracker -> the module that it is imported as, and what pip calls it
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
    "swanlab": ("swanlab", "swanlab"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "clearml": ("clearml", "clearml"),
    "neptune": ("neptune", "neptune"),
    "dvclive": ("dvclive", "dvclive"),
    "dagshub": ("dagshub", "dagshub"),
    "azure_ml": ("azureml", "azureml-core"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "flyte": ("flytekit", "flytekit"),
}
WANDB_HOST = "https://api.wandb.ai"
WANDB_WITHOUT_KEY = ("offline", "dryrun", "disabled")  # values of WANDB_MODE
CONNECT_SECONDS = 10.0


def check_trackers(names: Sequence[str]) -> None:
    """UserError where a tracker is not installed, has no key, or cannot be written to; `none` and `all` are neither."""
    for name in names:
        module, package = PACKAGES.get(name, (None, None))
        found = module is None or find_spec(module) or (name == "tensorboard" and find_spec("tensorboardX"))
        if not found:
            raise UserError(f"report_to: {name} is not installed: pip install {package}")
    if "wandb" in names:
        _check_wandb()
    if "mlflow" in names:
        _check_mlflow(os.environ.get("MLFLOW_TRACKING_URI") or "mlruns")


def _check_wandb() -> None:
    variables = os.environ
    if variables.get("WANDB_API_KEY") or variables.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    if variables.get("WANDB_MODE", "").lower() in WANDB_WITHOUT_KEY:
        return
    host = urlsplit(variables.get("WANDB_BASE_URL") or WANDB_HOST).hostname or ""
    files = [Path(variables["NETRC"])] if "NETRC" in variables else [Path.home() / ".netrc", Path.home() / "_netrc"]
    if not any(_has_login(file.expanduser(), host) for file in files):
        raise UserError("report_to: wandb has no key: run `wandb login`, set WANDB_API_KEY, or say WANDB_MODE=offline")


def _has_login(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _check_mlflow(uri: str) -> None:
    """A server is asked for a connection, a folder or a database file for the right to write; others are not known."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            where = f"{parts.hostname}:{port}"
            raise UserError(
                f"report_to: mlflow's server {where} does not answer ({first_line(error)}): see MLFLOW_TRACKING_URI"
            ) from error
        return
    if parts.scheme not in ("", "file", "sqlite"):
        return
    path = Path(parts.path.removeprefix("/") if parts.scheme == "sqlite" else url2pathname(parts.path) or uri)
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    is_store = existing == path.absolute() and (existing.is_dir() or parts.scheme == "sqlite")
    if not os.access(existing, os.W_OK) or not (is_store or existing.is_dir()):
        raise UserError(f"report_to: mlflow cannot write to {path}: see MLFLOW_TRACKING_URI")
