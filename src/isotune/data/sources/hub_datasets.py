"""Data sets of the Hub: which files are a split, by the rules of `datasets`, to be read as the same files on disk are.

`datasets` knows the layouts: names of files and folders, and the configurations that a card names. The files are then
read by our own readers where these know the format, so that no type is guessed and the content is known by the files'
digest. Any other format, a reader with options that the card sets, and a part of a split are left to `datasets`.
"""

import dataclasses
import json
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from isotune.data.sources.hub import Repository, download, fetch, open_repository
from isotune.data.sources.hub_access import hub_errors_named, is_offline, refusal_of
from isotune.io.errors import UserError, first_line

CARD = "README.md"
_PART_OF_SPLIT = re.compile(r"\w+(\[.*\]|\+.*)")  # as `datasets` writes it: train[:10%], train+test
_OF_EVERY_CONFIG = ("name", "version", "data_dir", "data_files", "description", "features")


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the Hub, in the Hub's cache."""

    files: list[Path]
    split: str
    reader: str  # of `datasets`: json, csv, parquet, text, ...
    options: dict[str, Any]  # of that reader, where the card sets any
    part_of: dict[str, list[str]] | None  # the files of every split, where `split` is a part or a sum of splits

    @property
    def is_whole_files(self) -> bool:
        """Whether the rows are those of `files`, whoever reads them."""
        return not self.options and self.part_of is None

    def load(self) -> Any:
        """The rows as `datasets` reads them, a `Dataset`."""
        datasets: Any = import_module("datasets")
        files = self.part_of or {self.split: [str(path) for path in self.files]}
        try:
            return datasets.load_dataset(self.reader, data_files=files, split=self.split, **self.options)
        except Exception as error:  # the readers raise what their formats' libraries raise
            names = ", ".join(path.name for path in self.files[:3])
            raise UserError(f"{names} cannot be read as {self.reader}: {first_line(error)}") from error


def open_hub_split(name: str, split: str, *, config: str | None, revision: str | None, key: str) -> HubSplit:
    """The files of a split of a data set on the Hub, fetched where they are not cached; UserError says why not.

    `key` is the recipe's name of `name`: dataset_name or eval_dataset_name.
    """
    repository = open_repository("dataset", name, revision, key=key)
    part = f"data-{quote(config or '', safe='')}"
    prefix = f"{key}: "
    with hub_errors_named("dataset", name, revision, prefix):
        found = fetch(repository, part, lambda ask_hub: _layout(repository, config, key, ask_hub), read=False)
    splits: dict[str, list[str]] = found["splits"]
    paths = {own: [str(repository.folder / file) for file in files] for own, files in splits.items()}
    if split in splits:
        chosen, part_of = splits[split], None
    elif _PART_OF_SPLIT.fullmatch(split):
        chosen, part_of = [file for files in splits.values() for file in files], paths
    else:
        raise UserError(f"{prefix}{name!r} has no split {split!r}; it has {', '.join(splits)}")
    repository.mark_read(chosen)
    return HubSplit([repository.folder / file for file in chosen], split, found["reader"], found["options"], part_of)


def load_prepared(name: str, split: str, config: str | None) -> Any | None:
    """A split that `datasets` itself prepared earlier, where the Hub's cache has no file of it; None without one."""
    if not is_offline("dataset"):
        return None
    datasets: Any = import_module("datasets")
    with suppress(Exception):  # whatever is wrong with that cache, the sentence about the Hub's stands
        return datasets.load_dataset(name, config, split=split)
    return None


def _layout(repository: Repository, config: str | None, key: str, ask_hub: bool) -> dict[str, Any]:
    """The files of each split of a configuration, the reader of `datasets` for them and its options."""
    from huggingface_hub.errors import EntryNotFoundError

    datasets: Any = import_module("datasets")
    place = repository.name if ask_hub else str(repository.folder)
    revision = {"revision": repository.commit} if ask_hub else {}
    if ask_hub:
        try:  # `datasets` would ask for it too, but not say why the Hub refuses
            download(repository, CARD, f"{key}: ")
        except UserError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
    try:
        # in an empty cache: where the Hub refuses, `datasets` would take whatever version it has ever prepared
        with tempfile.TemporaryDirectory() as empty:
            builder = datasets.load_dataset_builder(place, config, cache_dir=empty, **revision)
    except Exception as error:
        if refusal_of(error, "dataset", repository.name):
            raise
        raise UserError(f"{key}: {_why_not(repository, config, key, place, revision, error)}") from error
    prefix = f"hf://datasets/{repository.name}@{repository.commit}/" if ask_hub else f"{repository.folder.resolve()}/"
    splits = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    outside = [file for files in splits.values() for file in files if not file.startswith(prefix)]
    if outside:
        raise UserError(f"{key}: the data of {repository.name!r} lie outside its repository, at {outside[0]}")
    splits = {split: [file.removeprefix(prefix) for file in files] for split, files in splits.items()}
    return {
        "splits": splits,
        "files": sorted({file for files in splits.values() for file in files}),
        "reader": type(builder).__module__.split(".")[2],  # datasets.packaged_modules.READER.READER
        "options": _options_of(builder.config),
    }


def _options_of(config: Any) -> dict[str, Any]:
    """What a card sets of the reader's options."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in _OF_EVERY_CONFIG and value != default:
            with suppress(TypeError):
                found[field.name] = json.loads(json.dumps(value))
    return found


def _why_not(
    repository: Repository, config: str | None, key: str, place: str, revision: dict[str, str], error: Exception
) -> str:
    """The end of the sentence about a data set whose files cannot be found."""
    datasets: Any = import_module("datasets")
    names: list[str] = []
    with suppress(Exception):
        names = list(datasets.get_dataset_config_names(place, **revision))
    config_key = key.replace("_name", "_config")
    if config is not None and names and config not in names:
        return f"{repository.name!r} has no configuration {config!r}; it has {', '.join(names)}"
    if config is None and len(names) > 1:
        return f"{repository.name!r} has several configurations: choose one by {config_key}: {', '.join(names)}"
    return f"{repository.what} cannot be read: {first_line(error)}"
