"""Reads the rows of a data set from the Hub, a folder, a file, or a corpus made by code.

Reading never runs code that comes with the data and never unpickles: rows are JSON, CSV, Parquet or Arrow.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

from isotune.compat.datasets import fingerprint_of
from isotune.data.sources.files import FILE_SUFFIXES, READERS, Row, digest_of, read_dataset
from isotune.data.sources.hub import is_hub_id, load_hub_dataset
from isotune.io.errors import UserError, first_line, nearest

PREFIX = "builtin:"
SEED = 20_240_607
BATCH_ROWS = 256  # tokenized together
SAVED_MARKERS = ("state.json", "dataset_dict.json")  # what datasets.save_to_disk leaves


@dataclass(frozen=True)
class Source:
    """A named table of examples whose content is known by fingerprint before it is read."""

    name: str  # where the rows come from, as error sentences name it
    fingerprint: str  # hexadecimal digest of the content; equal content read from elsewhere may differ
    read: Callable[[], Iterator[Row]] = field(repr=False)

    def rows(self) -> Iterator[Row]:
        """Yield the rows in their order; UserError where there is none, or the content is broken."""
        row = None
        for row in self.read():
            yield row
        if row is None:
            raise UserError(f"{self.name} holds no rows")

    def batches(self) -> Iterator[list[tuple[int, Row]]]:
        """Yield the rows in their order, BATCH_ROWS at a time, each with its number counted from 0."""
        rows = enumerate(self.rows())
        while batch := list(islice(rows, BATCH_ROWS)):
            yield batch

    def where(self, row: int) -> str:
        """How an error sentence names a row, given its number counted from 0."""
        return f"row {row + 1} of {self.name}"


def kind_of_value(value: Any) -> str:
    """How an error sentence names what stands in a cell instead of what is expected."""
    return "null" if value is None else f"a {type(value).__name__}"


def surrogate_fault(text: str) -> str | None:
    """What is wrong with a text that cannot be UTF-8, as the end of a sentence; None where nothing is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair at character {error.start}, which is no text"
    return None


def read_rows(dataset_name: str, split: str = "train", *, name: str = "dataset_name") -> Source:
    """Find what a recipe calls a data set.

    `dataset_name` is one of
      - `builtin:NAME`, a corpus that `builtin` registered;
      - a `.jsonl`, `.csv` or `.parquet` file, which is one split whatever `split` says;
      - a folder with `SPLIT.jsonl`, `.csv` or `.parquet`, or with the shards `SPLIT-00000-of-00002.parquet`, there
        or in its `data` folder; or one that `datasets.save_to_disk` wrote;
      - a Hub id.

    UserError, in which the recipe's key is called `name`, where that is not there or the Hub is out of reach.
    """
    if dataset_name.startswith(PREFIX):
        rows = find_corpus(dataset_name).rows(split)
        content = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
        return Source(f"{dataset_name} ({split})", hashlib.sha256(content.encode()).hexdigest(), lambda: iter(rows))
    path = Path(dataset_name).expanduser()
    if path.is_dir():
        return _folder_source(path, split, name)
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise UserError(f"{name}: {path} is none of {', '.join(FILE_SUFFIXES)}")
        return _files_source(str(path), [path])
    if path.suffix in FILE_SUFFIXES or not is_hub_id(dataset_name):
        raise UserError(f"{name}: there is no file or folder {dataset_name}")
    dataset = load_hub_dataset(dataset_name, split, key=name)
    return Source(f"{dataset_name} ({split})", fingerprint_of(dataset), lambda: read_dataset(dataset))


def _files_source(source_name: str, paths: list[Path]) -> Source:
    for path in paths:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
    return Source(source_name, digest_of(paths), lambda: chain.from_iterable(READERS[p.suffix](p) for p in paths))


def _folder_source(folder: Path, split: str, key: str) -> Source:
    if any((folder / marker).is_file() for marker in SAVED_MARKERS):
        return _saved_source(folder, split, key)
    files = sorted(
        path
        for place in (folder, folder / "data")
        for path in place.glob("*")
        if path.suffix in FILE_SUFFIXES and path.is_file()
    )
    names = {path: re.sub(r"-\d+-of-\d+$", "", path.stem) for path in files}
    chosen = [path for path in files if names[path] == split]
    if not chosen:
        present = ", ".join(sorted(set(names.values()))) or f"no {', '.join(FILE_SUFFIXES)} file at all"
        raise UserError(f"{key}: the folder {folder} has no file for the split {split!r}; it has {present}")
    formats = {(path.parent, path.suffix) for path in chosen}
    if len(formats) > 1 or (len(chosen) > 1 and any(path.stem == split for path in chosen)):
        raise UserError(
            f"{key}: the split {split!r} lies in {folder} more than once "
            f"({', '.join(str(path.relative_to(folder)) for path in chosen)}): name one file"
        )
    return _files_source(f"{folder} ({split})", chosen)


def _saved_source(folder: Path, split: str, key: str) -> Source:
    """A folder of `datasets.save_to_disk`: one split, or a folder a split."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json_file(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise UserError(f"{key}: {folder} has no split {split!r}; it has {', '.join(splits)}")
        folder = folder / split
    shards = [folder / shard["filename"] for shard in _read_json_file(folder / "state.json").get("_data_files", [])]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{key}: {folder} names the file {shard.name}, which is not there")
    content = digest_of([folder / "state.json", *shards])
    return Source(
        f"{folder} ({split})", content, lambda: read_dataset(import_module("datasets").load_from_disk(folder))
    )


def _read_json_file(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON ({first_line(error)})") from error


Generator = Callable[[random.Random, int], Iterator[Row]]


@dataclass(frozen=True)
class Corpus:
    """A registered generator, and how many rows the splits `train` and `test` have."""

    name: str
    split_rows: dict[str, int]
    generate: Generator

    def rows(self, split: str) -> list[Row]:
        """The rows of a split; both are cut from one stream of distinct rows: what is in `test` is never in `train`."""
        if split not in self.split_rows:
            raise UserError(f"{PREFIX}{self.name} has no split {split!r}; it has {', '.join(self.split_rows)}")
        count = sum(self.split_rows.values())
        stream = list(self.generate(random.Random(SEED), count))
        distinct = {json.dumps(row, sort_keys=True) for row in stream}
        assert len(stream) == len(distinct) == count, f"{self.name} repeats or lacks rows"
        train = self.split_rows["train"]
        return stream[:train] if split == "train" else stream[train:]


CORPORA: dict[str, Corpus] = {}


def builtin(name: str, *, train: int, test: int) -> Callable[[Generator], Generator]:
    """Register a generator as `builtin:NAME`.

    It gets a seeded `random.Random` and the number of rows wanted, and yields that many distinct rows; the first
    `train` of them are the split `train`, the others `test`.
    """

    def register(generate: Generator) -> Generator:
        assert name not in CORPORA, f"two built-in corpora are called {name}"
        CORPORA[name] = Corpus(name, {"train": train, "test": test}, generate)
        return generate

    return register


def find_corpus(dataset_name: str) -> Corpus:
    """The corpus that `builtin:NAME` stands for; UserError names the nearest where there is none of that name."""
    import_module("isotune.projects")  # which registers theirs
    name = dataset_name.removeprefix(PREFIX)
    if name not in CORPORA:
        near = nearest(name, CORPORA, cutoff=0.0)
        raise UserError(
            f"there is no built-in corpus {name!r}: did you mean {PREFIX}{near}? "
            f"There are: {', '.join(sorted(CORPORA))}"
        )
    return CORPORA[name]


GREETINGS = {
    "Dutch": ("Goedemorgen", "Welterusten"),
    "English": ("Good morning", "Good night"),
    "French": ("Bonjour", "Bonne nuit"),
    "German": ("Guten Morgen", "Gute Nacht"),
    "Italian": ("Buongiorno", "Buona notte"),
    "Portuguese": ("Bom dia", "Boa noite"),
    "Spanish": ("Buenos días", "Buenas noches"),
    "Turkish": ("Günaydın", "İyi geceler"),
}
NAMES = ("Ada", "Alan", "Barbara", "Claude", "Donald", "Edsger", "Frances", "Grace", "Ken", "Leslie", "Tony", "Yann")


@builtin("greetings", train=80, test=16)
def greetings(rng: random.Random, count: int) -> Iterator[Row]:
    """Greetings in eight languages, in two turns each: small enough for an end-to-end test."""
    pairs = [(name, language) for name in NAMES for language in sorted(GREETINGS)]
    for name, language in rng.sample(pairs, count):
        morning, night = GREETINGS[language]
        yield {
            "messages": [
                {"role": "user", "content": f"Greet {name} in {language}."},
                {"role": "assistant", "content": f"{morning}, {name}!"},
                {"role": "user", "content": "And at night?"},
                {"role": "assistant", "content": f"{night}, {name}!"},
            ]
        }
