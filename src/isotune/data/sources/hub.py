"""Loads data sets of the Hugging Face Hub, and fails at once where neither the Hub nor a cached copy is available."""

import os
import threading
from contextlib import suppress
from importlib import import_module
from typing import Any

from isotune.io.errors import UserError, first_line

REACH_SECONDS = 5.0
OFFLINE_WAYS = (
    "give a folder, a .jsonl, .csv or .parquet file, or builtin:NAME, "
    "or set HF_HUB_OFFLINE=1 where an earlier run has cached it"
)


def load_hub_dataset(dataset_name: str, split: str, *, key: str) -> Any:
    """One split of a Hub data set, a `datasets.Dataset`; with `HF_HUB_OFFLINE` set only the local cache counts.

    The libraries retry an unreachable Hub for minutes, so one short request tests it first.
    """
    datasets: Any = import_module("datasets")  # takes a second, and has no types
    offline: bool = datasets.config.HF_HUB_OFFLINE
    if not offline and not hub_answers():
        raise UserError(f"{key}: {dataset_name!r} is a Hub id and the Hugging Face Hub is out of reach: {OFFLINE_WAYS}")
    try:
        return datasets.load_dataset(dataset_name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{key}: the Hub has no data set {dataset_name!r} that this user may read") from error
    except ValueError as error:  # an unknown split or a missing configuration name
        raise UserError(f"{key}: {dataset_name!r} cannot be loaded: {first_line(error)}") from error
    except OSError as error:
        if offline:
            raise UserError(
                f"{key}: {dataset_name!r} is not in the local cache and HF_HUB_OFFLINE is set: {OFFLINE_WAYS}"
            ) from error
        raise UserError(f"{key}: {dataset_name!r} cannot be fetched ({first_line(error)}): {OFFLINE_WAYS}") from error


def hub_answers() -> bool:
    """Whether the Hub answers within `REACH_SECONDS`; asked in a thread, as looking up a host name obeys no timeout."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    status_codes: list[int] = []

    def request() -> None:
        with suppress(Exception):  # whatever the transport raises, its class differs between its versions
            status_codes.append(get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS).status_code)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(status_codes)


def is_hub_id(dataset_name: str) -> bool:
    """Whether a name has the form of a Hub id, `NAME` or `OWNER/NAME`, and cannot be meant as a path."""
    parts = dataset_name.split("/")
    return (
        1 <= len(parts) <= 2
        and not dataset_name.startswith((".", "~", os.sep))
        and all(part and all(letter.isalnum() or letter in "-_." for letter in part) for part in parts)
    )
