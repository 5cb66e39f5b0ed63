"""A model that the command line names: a folder or a Hub id, and not the run of an adapter."""

from pathlib import Path

from isotune.data.sources.hub import is_hub_id
from isotune.io.errors import UserError
from isotune.models.finished_run import ADAPTER_CONFIG


def check_named_model(name: str) -> None:
    """Refuse what --model cannot open.

    Raises:
        UserError: an adapter without its base, or neither a folder nor a Hub id.
    """
    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise UserError(f"--model {name} is an adapter without its base: give the folder of its run with --run_dir")
    if not Path(name).is_dir() and not is_hub_id(name):
        raise UserError(f"there is no model folder {name}")
