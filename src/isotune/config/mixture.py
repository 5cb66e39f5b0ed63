"""Reads `dataset_mixture` into its one form, from the spellings that are in use.

    - {dataset_name: chats.jsonl, weight: 0.5}            half of its rows
    - {dataset_name: OWNER/NAME, dataset_split: train}    all of its rows

The list may stand under `datasets`, as TRL, open-r1 and the alignment handbook write it, with their names of the keys;
a mapping of names to weights is a list of entries with these two. A flag takes the same as JSON, in one word or a word
for each entry.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from isotune.config.schema import check_name
from isotune.io.errors import did_you_mean, shown
from isotune.io.reading import Unreadable, parse_json

Entry = dict[str, Any]

NAME, WEIGHT, FRACTION = "dataset_name", "weight", "fraction"
# an entry's keys, by the names that other tools give them
SPELLINGS = {
    **dict.fromkeys((NAME, "path", "id"), NAME),
    **dict.fromkeys(("dataset_split", "split"), "dataset_split"),
    **dict.fromkeys(("dataset_config", "config", "name"), "dataset_config"),
    **dict.fromkeys(("dataset_revision", "revision"), "dataset_revision"),
    "dataset_columns": "dataset_columns",  # of a CSV file whose first line is a row
    "columns": "columns",  # to read; all where left out
    WEIGHT: WEIGHT,
    FRACTION: FRACTION,
}
LISTS = ("columns", "dataset_columns")
READERS = ("json", "csv", "parquet", "arrow")  # names of `datasets` for "the files that data_files names"
OF_THE_WHOLE = {
    "seed": "the recipe's seed chooses the rows",
    "test_split_size": "say eval_dataset_name, or eval_split_share for a classifier",
    "streaming": "leave streaming out: rows are read in bounded memory, prepared once and mapped from disk",
}
SHOWN_NAMES = 3


def read_mixture(value: Any) -> list[Entry]:
    """The entries of a mixture in their one form; ValueError, as the end of a sentence, says what is wrong."""
    if isinstance(value, str):
        value = _from_json(value)
        value = [value] if _is_entry(value) else value
    if isinstance(value, Mapping):
        value = _entries_of(cast(Mapping[str, Any], value))
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError("it takes a list of data sets, each with dataset_name and weight")
    each_alone = [one for each in cast(Sequence[Any], value) for one in _entries_of_word(each)]
    entries = [_read_entry(each, number) for number, each in enumerate(each_alone, start=1)]
    if not entries:
        raise ValueError("it takes at least one data set")
    shares = [FRACTION in entry for entry in entries]
    if any(shares) and not all(shares):
        raise ValueError("fraction is said of some data sets and not of all: it is a share of the whole mixture")
    return entries


def mixture_name(entries: Sequence[Mapping[str, Any]]) -> str:
    """How messages name a mixture: by the data sets in it."""
    names = [str(entry[NAME]) for entry in entries]
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return " + ".join(names[:SHOWN_NAMES]) + more


def _from_json(text: str) -> Any:
    try:
        return parse_json(text)
    except Unreadable:
        raise ValueError('as a flag it takes JSON, such as {"chats.jsonl": 1, "OWNER/NAME": 0.5}') from None


def _entries_of_word(each: Any) -> list[Any]:
    """The entries that an item of a list holds; of several words of a flag each may be JSON."""
    if not isinstance(each, str) or not each.lstrip().startswith("{"):
        return [each]
    mapping: Mapping[str, Any] = _from_json(each)
    return [mapping] if _is_entry(mapping) or "datasets" in mapping else _entries_of(mapping)


def _is_entry(value: Any) -> bool:
    """Whether a value of JSON is an entry by its name's key, and no mapping of names to weights, which are numbers."""
    if not isinstance(value, Mapping):
        return False
    mapping = cast(Mapping[str, Any], value)
    return any(isinstance(mapping.get(key), str) for key, own in SPELLINGS.items() if own == NAME)


def _entries_of(mapping: Mapping[str, Any]) -> Any:
    """The list in a mapping: under `datasets`, or made of its names and weights."""
    if "datasets" not in mapping:
        return [{NAME: name, WEIGHT: weight} for name, weight in mapping.items()]
    for key, value in mapping.items():
        is_off = str(value).lower() in ("none", "false", "null", "")
        if key != "datasets" and not is_off:
            raise ValueError(OF_THE_WHOLE.get(key) or f"{key} is not a key of a mixture")
    return mapping["datasets"]


def _read_entry(entry: Any, number: int) -> Entry:
    where = f"data set {number}"
    if isinstance(entry, str):
        entry = {NAME: entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {shown(entry, 40)}, not a name or a mapping with dataset_name")
    given = {key: value for key, value in cast(Mapping[str, Any], entry).items() if value is not None}
    given = _with_files(given, where)
    read: Entry = {}
    for key, value in given.items():
        if key not in SPELLINGS:
            raise ValueError(f"{where} has the key {shown(key, 40)}{did_you_mean(key, SPELLINGS)}")
        own = SPELLINGS[key]
        if own in read:
            raise ValueError(f"{where} says {own} twice: {key} is another name of it")
        read[own] = _value(own, value, f"{where}: {key}")
    if NAME not in read:
        raise ValueError(f"{where} has no dataset_name")
    if {WEIGHT, FRACTION} <= read.keys():
        raise ValueError(f"{where} has weight, a share of its own rows, and fraction, its share of the mixture")
    return read if FRACTION in read else {**read, WEIGHT: read.get(WEIGHT, 1.0)}


def _with_files(given: dict[str, Any], where: str) -> dict[str, Any]:
    """An entry whose `data_files` or `data_dir` of `datasets` is the name of what is read."""
    rest = dict(given)
    files, folder = rest.pop("data_files", None), rest.pop("data_dir", None)
    place = files if files is not None else folder
    if place is None:
        return rest
    key = next((key for key in ("path", "id", NAME) if key in rest), "path")
    if not isinstance(place, str) or (files is not None and folder is not None) or rest.get(key) not in READERS:
        raise ValueError(f"{where}: data_files and data_dir name one file or folder of path: json, csv or parquet")
    return {**rest, key: place}


def _value(key: str, value: Any, where: str) -> Any:
    if key in LISTS:
        words = value.replace(",", " ").split() if isinstance(value, str) else value
        if (
            not isinstance(words, list)
            or not words
            or not all(isinstance(word, str) for word in cast(list[Any], words))
        ):
            raise ValueError(f"{where} is {shown(value, 40)}: it takes a list of names")
        return cast(list[str], words)
    if key in (WEIGHT, FRACTION):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{where} is {shown(value, 40)}: it takes a number above 0")
        return number
    text = os.fspath(cast("str | os.PathLike[str]", value)) if isinstance(value, str | os.PathLike) else ""
    if not text:
        raise ValueError(f"{where} is {shown(cast(object, value), 40)}: it takes a text")
    try:
        check_name(text)
    except ValueError as error:
        raise ValueError(f"{where} is {shown(text, 40)}: {error}") from None
    return os.path.expanduser(text) if key == NAME else text
