"""Which files are a split by the rules of `datasets`: names of files and folders, and configurations that a card names.

The card is README.md, whose first lines are YAML. A folder on disk is read by these rules where its card has `configs`,
as a clone of a data set on the Hub has. The files are then read by our own readers where these know the format, so that
no type is guessed and the content is known by the files' digest. Any other format, a reader with options that the card
sets, and a part of a split are left to `datasets`.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from isotune.data.sources.class_labels import ClassNames, class_names_of, features_class_names
from isotune.data.sources.layout import lacking_shards
from isotune.io.errors import UserError, first_line
from isotune.io.reading import Unreadable, parse_yaml, read_bytes, read_json_object

CARD, INFOS = "README.md", "dataset_infos.json"
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", re.S)
_PART_OF_SPLIT = re.compile(r"\w+(\[.*\]|\+.*)")  # as `datasets` writes it: train[:10%], train+test
_OF_EVERY_CONFIG = ("name", "version", "data_dir", "data_files", "description", "features")

# `splits`, the files of each by its name; `files`, all; `reader`; `options`; `class_names`; `num_examples`, the rows of
# each split that the card counts; `named`, the files that the card names itself, None where the Hub listed all files
Layout = dict[str, Any]


@dataclass(frozen=True)
class ListedSplit:
    """The files of a split."""

    files: list[Path]
    split: str
    reader: str  # of `datasets`: json, csv, parquet, text, ...
    options: dict[str, Any]  # of that reader, where the card sets any
    part_of: dict[str, list[str]] | None  # the files of every split, where `split` is a part or a sum of splits
    class_names: ClassNames  # that the card gives
    num_examples: int | None = None  # rows that the card counts

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


def key_beside(key: str, what: str) -> str:
    """What says the config, revision or split of the data that a recipe's key, or a flag, names."""
    return f"--dataset_{what}" if key.startswith("--") else key.replace("_name", f"_{what}")


def has_configs(folder: Path) -> bool:
    """Whether the card in a folder names configurations; UserError where it does so in lines that are no YAML."""
    path = folder / CARD
    try:
        text = _front_of(path)
        return "configs" in text and bool(_mapping(parse_yaml(text)).get("configs"))
    except Unreadable as reason:
        told = str(reason).removeprefix("it is not YAML: ")
        raise UserError(f"{path} begins with lines that are not YAML: {told}") from None


def _front_of(card: Path) -> str:
    """The first lines of a card, which are YAML; empty where there are none. Unreadable where the file is."""
    front = _FRONT.match(read_bytes(card).decode("utf-8-sig", "replace")) if card.is_file() else None
    return front[1] if front else ""


def class_names_beside(folder: Path, config: str | None) -> ClassNames:
    """The names of classes that the card in a folder gives, or the dataset_infos.json of earlier ones.

    They are those of `config`, or of the only configuration; nothing where the files are none of `datasets`.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        infos = _mapping(parse_yaml(_front_of(folder / CARD)))
        listed: Any = infos.get("dataset_info") or []
        listed = [listed] if isinstance(listed, Mapping) else listed
        if own := [info for info in listed if config in (None, info.get("config_name"))]:
            return _names_in_card(own[0]["features"]) if len(own) == 1 else {}
        if (folder / INFOS).is_file():
            of_configs = read_json_object(folder / INFOS)
            chosen = list(of_configs.values()) if config is None else [of_configs[config]]
            return features_class_names(chosen[0]["features"]) if len(chosen) == 1 else {}
    return {}


def _names_in_card(features: list[dict[str, Any]]) -> ClassNames:
    """The names of ClassLabels, or of lists of them, as a card writes features."""
    found: ClassNames = {}
    for feature in features:
        kinds = [_mapping(feature.get(key)) for key in ("dtype", "sequence", "list")]
        label = next((kind["class_label"] for kind in kinds if "class_label" in kind), None)
        if label is not None:
            names: Any = label["names"]  # by number, as texts, or a list
            is_list = isinstance(names, list)
            by_number = dict(enumerate(cast(list[str], names))) if is_list else cast(dict[Any, str], names)
            found[feature["name"]] = (tuple(str(by_number[number]) for number in sorted(by_number, key=int)),)
    return found


def open_card_split(folder: Path, split: str, *, config: str | None, key: str) -> ListedSplit:
    """The files of a split in a folder on disk whose card names configurations; UserError says why not.

    `key` is the recipe's name of `folder`: dataset_name or eval_dataset_name.
    """
    place, name = str(folder.resolve()), str(folder)
    try:
        layout = read_layout(place, config, f"{place}/", name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    except Exception as error:  # `datasets` raises what YAML, its patterns and its own checks raise
        raise UserError(f"{key}: {why_no_layout(place, config, key, name, error)}") from error
    return split_of(layout, split, folder, f"{key}: {name!r}")


def read_layout(place: str, config: str | None, prefix: str, name: str, **revision: str) -> Layout:
    """The files of each split of a configuration, without `prefix`; the reader of `datasets`, its options, class names.

    `place` is a folder or a Hub id. UserError where files lie outside it; else what `datasets` raises.
    """
    datasets: Any = import_module("datasets")
    # in an empty cache: where the Hub refuses, `datasets` would take whatever version it has ever prepared
    with tempfile.TemporaryDirectory() as empty:
        builder = datasets.load_dataset_builder(place, config, cache_dir=empty, **revision)
    splits = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    every = [file for files in splits.values() for file in files]
    outside = [file for file in every if not file.startswith(prefix) or ".." in file.removeprefix(prefix).split("/")]
    if outside:
        raise UserError(f"the data of {name!r} lie outside it, at {outside[0]}")
    sizes: Any = builder.info.splits or {}
    splits = {split: [file.removeprefix(prefix) for file in files] for split, files in splits.items()}
    return {
        "splits": splits,
        "files": sorted({file.removeprefix(prefix) for file in every}),
        "reader": type(builder).__module__.split(".")[2],  # datasets.packaged_modules.READER.READER
        "options": _options_of(builder.config),
        "class_names": class_names_of(builder.info.features or {}),
        "num_examples": {str(own): each.num_examples for own, each in sizes.items()},
        "named": None if revision else sorted(_named_files(Path(place) / CARD)),
    }


def _named_files(card: Path) -> set[str]:
    """The paths and patterns of files in the configurations of a card."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.add(value.removeprefix("./"))
        elif isinstance(value, Mapping | list):
            for each in cast(Any, value).values() if isinstance(value, Mapping) else cast(list[Any], value):
                collect(each)

    with suppress(Unreadable):
        collect(_mapping(parse_yaml(_front_of(card))).get("configs"))
    return found


def split_of(layout: Layout, split: str, root: Path, what: str) -> ListedSplit:
    """A split of a layout, or a part or sum of splits.

    UserError, which begins with `what`, where there is none, or a pattern of the card finds some of its shards alone.
    """
    splits: dict[str, list[str]] = layout["splits"]
    if split in splits:
        chosen, part_of = splits[split], None
    elif _PART_OF_SPLIT.fullmatch(split):
        chosen = [file for files in splits.values() for file in files]
        part_of = {own: [str(root / file) for file in files] for own, files in splits.items()}
    else:
        raise UserError(f"{what} has no split {split!r}; it has {', '.join(splits)}")
    named: dict[str, Any] = layout.get("class_names", {})  # layouts that earlier versions kept have none
    names = {column: tuple(tuple(each) for each in lists) for column, lists in named.items()}
    own = layout.get("named")  # the Hub itself has no shard but those that it lists
    found_by_pattern = [root / file for file in chosen if own is not None and file not in own]
    if lacks := lacking_shards(found_by_pattern, root):
        raise UserError(f"{what} {lacks}")
    paths = [root / file for file in chosen]
    counted = layout.get("num_examples", {}).get(split) or None
    return ListedSplit(paths, split, layout["reader"], layout["options"], part_of, names, counted)


def why_no_layout(place: str, config: str | None, key: str, name: str, error: Exception, **revision: str) -> str:
    """The end of the sentence about a data set whose files cannot be found, given what `read_layout` raised."""
    datasets: Any = import_module("datasets")
    names: list[str] = []
    with suppress(Exception):
        names = list(datasets.get_dataset_config_names(place, **revision))
    if config is not None and names and config not in names:
        return f"{name!r} has no configuration {config!r}; it has {', '.join(names)}"
    if config is None and len(names) > 1:
        return f"{name!r} has several configurations: choose one by {key_beside(key, 'config')}: {', '.join(names)}"
    return f"{name!r} cannot be read: {first_line(error)}"


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


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}
