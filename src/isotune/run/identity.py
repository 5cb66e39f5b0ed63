"""Whether two recipes are the same run: where they name local files, by what lies there and not by the path."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from isotune.config import ClassificationRecipe, RunRecipe
from isotune.config.mixture import mixture_name
from isotune.data.mixture import EVALUATED, evaluation_columns
from isotune.data.sft.chat_format import WORDS as CHAT_WORDS
from isotune.data.sources.source import PREFIX, read_rows
from isotune.io.errors import UserError
from isotune.io.files import digest_of_file
from isotune.io.folders import expanded
from isotune.models.base.folder import digest_of_model

MODELS = ("model_name_or_path", "tokenizer_name_or_path")
FILES = ("chat_format", "augment_synonyms")  # keys that may name one
MIXTURES = {"dataset_mixture": "train", "eval_dataset_mixture": EVALUATED}  # with the split of an entry without one
DATA = {"dataset_name": "dataset_split", "eval_dataset_name": "eval_dataset_split"}


@dataclass(frozen=True)
class RunIdentity:
    """The values of a recipe that decide a run's result, and a digest of what lies in each local place they name."""

    values: dict[str, Any]
    contents: dict[str, str] = field(default_factory=dict[str, str])  # by key; without Hub ids and builtin:NAME

    @classmethod
    def of(cls, recipe: RunRecipe) -> Self:
        """The identity of a recipe; every file that it names is read."""
        left_open = recipe.found_in_data - recipe.given.keys()
        values = {name: value for name, value in recipe.result_values().items() if name not in left_open}
        return cls(json.loads(json.dumps(values)), contents_of(recipe))

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of contents in place of their names."""
        return hashlib.sha256(json.dumps({**self.values, **self.contents}, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Self) -> dict[str, str]:
        """What tells this run from `other`: a short sentence by key. Names are compared where a content is unknown."""
        found: dict[str, str] = {}
        for key in sorted({**self.values, **other.values}):
            here, there = self.values.get(key), other.values.get(key)
            if key in ClassificationRecipe.found_in_data and None in (here, there):
                continue  # one of the two leaves it to the data
            if key == "chat_format" and "auto" in (here, there):
                continue  # one of the two leaves it to the tokenizer, whose files are compared
            known = key in self.contents and key in other.contents
            if known and self.contents[key] != other.contents[key]:
                there, here = (mixture_name(each) if key in MIXTURES and each else each for each in (there, here))
                where = f"of {there} there, of {here} here" if here != there else f"of {here} have changed since"
                found[key] = f"{key}: the contents {where}"
            elif not known and here != there:
                found[key] = f"{key}: {there} there, {here} here"
        return found


def contents_of(recipe: RunRecipe) -> dict[str, str]:
    """A digest of what lies in each local place that a recipe names, by key; none for what is not there."""
    found: dict[str, str] = {}
    values = recipe.values
    for key in MODELS:
        if values[key] and not values[key].startswith(PREFIX) and Path(values[key]).is_dir():
            found[key] = digest_of_model(Path(values[key]))
    for key in FILES:
        name = values.get(key)
        if name and name not in CHAT_WORDS and Path(name).is_file():
            found[key] = digest_of_file(Path(name)).hex()
    for key, split in DATA.items():
        name = None if values.get(key.replace("_name", "_mixture")) else values[key]
        if name and not name.startswith(PREFIX) and expanded(name).exists():
            config = values[key.replace("_name", "_config")]
            with suppress(UserError):  # whoever reads it says what is wrong
                columns = values["dataset_columns"]
                columns = columns if key == "dataset_name" else evaluation_columns(columns)
                source = read_rows(name, values[split], name=key, columns=columns, config=config)
                found[key] = source.fingerprint
    for key, split in MIXTURES.items():
        if values.get(key):
            found[key] = json.dumps([_content_of_entry(entry, split) for entry in values[key]], sort_keys=True)
    return found


def _content_of_entry(entry: dict[str, Any], split: str) -> dict[str, Any]:
    """An entry of a mixture with the content of a local place instead of its name."""
    name: str = entry["dataset_name"]
    if not name.startswith(PREFIX) and Path(name).exists():
        with suppress(UserError):
            split, columns = entry.get("dataset_split", split), entry.get("dataset_columns")
            config = entry.get("dataset_config")
            return entry | {"dataset_name": read_rows(name, split, columns=columns, config=config).fingerprint}
    return entry
