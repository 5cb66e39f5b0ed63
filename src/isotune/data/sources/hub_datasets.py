"""Data sets of the Hub: which files are a split, to be read as the same files on disk are."""

from contextlib import suppress
from importlib import import_module
from typing import Any
from urllib.parse import quote

from isotune.data.sources.card import CARD, Layout, ListedSplit, read_layout, split_of, why_no_layout
from isotune.data.sources.hub import Repository, download, fetch, open_repository
from isotune.data.sources.hub_access import hub_errors_named, is_offline, refusal_of
from isotune.io.errors import UserError


def open_hub_split(name: str, split: str, *, config: str | None, revision: str | None, key: str) -> ListedSplit:
    """The files of a split of a data set on the Hub, fetched where they are not cached; UserError says why not.

    `key` is the recipe's name of `name`: dataset_name or eval_dataset_name.
    """
    repository = open_repository("dataset", name, revision, key=key)
    part = f"data-{quote(config or '', safe='')}"
    prefix = f"{key}: "
    with hub_errors_named("dataset", name, revision, prefix):
        found = fetch(repository, part, lambda ask_hub: _layout(repository, config, key, ask_hub), read=False)
    chosen = split_of(found, split, repository.folder, f"{prefix}{name!r}")
    repository.mark_read(path.relative_to(repository.folder).as_posix() for path in chosen.files)
    return chosen


def load_prepared(name: str, split: str, config: str | None) -> Any | None:
    """A split that `datasets` itself prepared earlier, where the Hub's cache has no file of it; None without one."""
    if not is_offline("dataset"):
        return None
    datasets: Any = import_module("datasets")
    with suppress(Exception):  # whatever is wrong with that cache, the sentence about the Hub's stands
        return datasets.load_dataset(name, config, split=split)
    return None


def _layout(repository: Repository, config: str | None, key: str, ask_hub: bool) -> Layout:
    """The layout of a configuration, of what is cached where the Hub is not to be asked."""
    from huggingface_hub.errors import EntryNotFoundError

    place = repository.name if ask_hub else str(repository.folder)
    revision = {"revision": repository.commit} if ask_hub else {}
    if ask_hub:
        try:  # `datasets` would ask for it too, but not say why the Hub refuses
            download(repository, CARD, f"{key}: ")
        except UserError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
    prefix = f"hf://datasets/{repository.name}@{repository.commit}/" if ask_hub else f"{repository.folder.resolve()}/"
    try:
        return read_layout(place, config, prefix, repository.name, **revision)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    except Exception as error:
        if refusal_of(error, "dataset", repository.name):
            raise
        why = why_no_layout(place, config, key, repository.name, error, **revision)
        raise UserError(f"{key}: {why}") from error
