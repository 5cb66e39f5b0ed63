"""Reads the rows of a data set from the Hub, a folder, a file, or a corpus made by code.

Reading never runs code that comes with the data and never unpickles: rows are JSON, CSV, Parquet or Arrow.
"""

import hashlib
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from isotune.compat.datasets import fingerprint_of
from isotune.data.sources.arrow_rows import read_dataset
from isotune.data.sources.card import ListedSplit, class_names_beside, has_configs, key_beside, open_card_split
from isotune.data.sources.class_labels import class_names_of, features_class_names, file_class_names
from isotune.data.sources.csv_rows import SHOWN_CHARACTERS, looks_like_row, unnamed_columns
from isotune.data.sources.files import (
    CSV_FORMATS,
    BorrowedColumns,
    Row,
    columns_of,
    digest_of,
    is_lfs_pointer,
    reader_of,
)
from isotune.data.sources.hub import is_hub_id
from isotune.data.sources.hub_datasets import load_prepared, open_hub_split
from isotune.data.sources.layout import find_split
from isotune.io.errors import UserError, first_line, nearest, shown
from isotune.io.folders import described, expanded
from isotune.io.formats import FORMAT_WORDS, format_of
from isotune.io.reading import Unreadable, read_json
from isotune.io.run_files import or_refuse

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
    # what reading guessed and left out, a sentence each: complete when all rows are read
    notes: list[str] = field(default_factory=list[str], compare=False)
    # the number of the first row of each file that has been read from, counted from 0
    starts: list[tuple[int, Path]] = field(default_factory=list[tuple[int, Path]], repr=False, compare=False)
    names_by_line: bool = False  # whether the columns are named by the first line of a CSV file
    # by column, the names of the classes that its numbers stand for; further lists name the same classes otherwise
    class_names: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict[str, Any])

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
        """How an error sentence names a row, given its number counted from 0: by its file where that was read."""
        number = bisect_right(self.starts, row, key=lambda start: start[0]) - 1
        if len(self.starts) > 1 and number >= 0:
            first, path = self.starts[number]
            return f"row {row - first + 1} of {path}"
        return f"row {row + 1} of {self.name}"

    def part_of(self, row: int) -> int:
        """Which source of a mixture a row is of, which has been read; of any other source 0."""
        return 0

    def unnamed(self, cells: Sequence[str], *, are_conversations: bool = False) -> UserError:
        """The error of a file whose first line, with these cells, is a row and names no columns."""
        file = self.starts[0][1] if self.starts else self.name
        return UserError(unnamed_columns(f"{file} line 1", cells, are_conversations=are_conversations))

    def lacks(self, number: int, row: Row, column: str, key: str) -> UserError:
        """The error of a row that lacks a column, which the recipe names by `key`."""
        names = list(row)
        if self.names_by_line and looks_like_row(names):
            return self.unnamed(names, are_conversations="prompt" in key)
        present = ", ".join(names) or "none"
        if len(present) > SHOWN_CHARACTERS:
            present = f"{present[:SHOWN_CHARACTERS]}... ({len(names)} in all)"
        way = f"name it by {key}" + (", or all by dataset_columns if line 1 is a row" if self.names_by_line else "")
        return UserError(f"{self.where(number)} lacks the column '{column}'; it has {present}: {way}")


def is_null(value: Any) -> bool:
    """Whether a cell holds nothing: null, or the NaN that programs write for it."""
    return value is None or (isinstance(value, float) and value != value)


def kind_of_value(value: Any) -> str:
    """How an error sentence names what stands in a cell instead of what is expected."""
    if isinstance(value, bytes):
        return "bytes that are not UTF-8"
    kinds: dict[type[object], str] = {bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    kind = cast("type[object]", type(value))
    return "null" if is_null(value) else kinds.get(kind, f"a {kind.__name__}")


def told(value: Any) -> str:
    """A cell as an error sentence shows it: null, or what it holds, shortened."""
    return "null" if is_null(value) else shown(value)


def surrogate_fault(text: str) -> str | None:
    """What is wrong with a text that cannot be UTF-8, as the end of a sentence; None where nothing is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair at character {error.start}, which is no text"
    return None


def read_rows(
    dataset_name: str,
    split: str = "train",
    *,
    name: str = "dataset_name",
    columns: Sequence[str] | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Source:
    """Find what a recipe calls a data set.

    `dataset_name` is one of
      - `builtin:NAME`, a corpus that `builtin` registered;
      - a file of one of DATA_FORMATS, also compressed, which is one split whatever `split` says;
      - a folder that holds such files, as its card names those of a split in the configuration `config`, or, without
        a card that names any, as `find_split` finds them; or one that `datasets.save_to_disk` wrote;
      - a Hub id; `config` is one of the configurations that its card names, `revision` a branch, tag or commit.

    `columns` name those of CSV files whose first line is a row; those that are borrowed say nothing of any other file.
    UserError, in which the recipe's key is called `name`,
    where the data set is not there, the Hub is out of reach, or `columns` are given for anything but CSV.
    """
    path = expanded(dataset_name)
    if dataset_name.startswith(PREFIX) or path.exists():
        if revision is not None:
            raise UserError(f"{key_beside(name, 'revision')} is for Hub ids, and {dataset_name} is none")
        if config is not None and not path.is_dir():
            raise UserError(f"{key_beside(name, 'config')} is for Hub ids and folders; {dataset_name} is none")
    if dataset_name.startswith(PREFIX):
        _check_columns(columns, None, dataset_name)
        rows = find_corpus(dataset_name).rows(split)
        content = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
        return Source(f"{dataset_name} ({split})", hashlib.sha256(content.encode()).hexdigest(), lambda: iter(rows))
    if path.is_dir():
        try:
            return _folder_source(path, split, name, columns, config)
        except UserError:
            if (what := described(path)) is not None and not what.startswith("a folder"):
                raise UserError(f"{name}: {path} is {what}, and no data set") from None
            raise
    if path.is_file():
        if format_of(path) is None:
            raise UserError(f"{name}: {path} is none of {FORMAT_WORDS}")
        return _files_source(str(path), [path], columns, [])
    if format_of(path) or not is_hub_id(dataset_name):
        raise UserError(f"{name}: there is no file or folder {dataset_name}")
    return _hub_source(dataset_name, split, columns, config, revision, name)


def _hub_source(
    dataset_name: str, split: str, columns: Sequence[str] | None, config: str | None, revision: str | None, key: str
) -> Source:
    name = f"{dataset_name} ({split})"
    try:
        found = open_hub_split(dataset_name, split, config=config, revision=revision, key=key)
    except UserError:
        prepared = load_prepared(dataset_name, split, config) if revision is None else None
        if prepared is None:
            raise
        names = class_names_of(prepared.features)
        return Source(name, fingerprint_of(prepared), lambda: read_dataset(prepared), class_names=names)
    return _listed_source(name, found, columns)


def _listed_source(name: str, found: ListedSplit, columns: Sequence[str] | None) -> Source:
    """The rows of a split that a card lists, with a note where they are not as many as the card counts."""
    source = _rows_of_listed(name, found, columns)
    if found.num_examples is None:
        return source

    def read() -> Iterator[Row]:
        count = 0
        for row in source.read():
            count += 1
            yield row
        note = f"{name} has {count:,} rows, and its card counts {found.num_examples:,}: the card is older, or rows lack"
        if count != found.num_examples and note not in source.notes:
            source.notes.append(note)

    return replace(source, read=read)


def _rows_of_listed(name: str, found: ListedSplit, columns: Sequence[str] | None) -> Source:
    if found.is_whole_files and all(format_of(path) for path in found.files):
        source = _files_source(name, found.files, columns, [])
        return replace(source, class_names={**found.class_names, **source.class_names})
    _check_columns(columns, None, name)
    of_splits = {own: digest_of(list(map(Path, files))) for own, files in (found.part_of or {}).items()}
    told = f"{digest_of(found.files)} {found.split} {found.options}{f' {of_splits}' if of_splits else ''}"
    content = hashlib.sha256(told.encode()).hexdigest()
    loaded = cache(found.load)
    return Source(name, content, lambda: read_dataset(loaded()), class_names=class_names_of(loaded().features))


def _check_columns(columns: Sequence[str] | None, path: Path | None, dataset_name: str) -> None:
    is_borrowed = isinstance(columns, BorrowedColumns)
    if columns and not is_borrowed and (path is None or format_of(path) not in CSV_FORMATS):
        raise UserError(f"dataset_columns: the columns of {path or dataset_name} have names: leave the key out")
    if columns and len(set(columns)) < len(columns):
        raise UserError(f"dataset_columns names a column twice: {', '.join(columns)}")


def _files_source(source_name: str, paths: list[Path], columns: Sequence[str] | None, notes: list[str]) -> Source:
    for path in paths:
        _check_columns(columns, path, source_name)
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        if is_lfs_pointer(path):
            raise UserError(
                f"{path} is a pointer of Git LFS and holds no rows: fetch the file itself by `git lfs pull`"
            )
    needed = [columns_of(path, columns) for path in paths]
    readers = [(path, reader_of(path, own)) for path, own in zip(paths, needed, strict=True)]
    found = list(notes)
    starts: list[tuple[int, Path]] = []

    def read() -> Iterator[Row]:
        notes[:], starts[:], count = found, [], 0
        for path, read_file in readers:
            starts.append((count, path))
            for row in read_file(notes):
                count += 1
                yield row

    by_line = needed[0] is None and format_of(paths[0]) in CSV_FORMATS
    names = file_class_names(paths[0])
    return Source(source_name, digest_of(paths, next(filter(None, needed), None)), read, notes, starts, by_line, names)


def _folder_source(folder: Path, split: str, key: str, columns: Sequence[str] | None, config: str | None) -> Source:
    if has_configs(folder):
        found = open_card_split(folder, split, config=config, key=key)
        of_config = f", {config}" if config else ""
        return _listed_source(f"{folder} ({split}{of_config})", found, columns)
    names = class_names_beside(folder, config)
    if config is not None:
        if not (folder / config).is_dir():
            raise UserError(
                f"{key_beside(key, 'config')}: {folder} has no folder {config!r}, and no README.md that names "
                "configurations"
            )
        folder = folder / config
    if any((folder / marker).is_file() for marker in SAVED_MARKERS):
        _check_columns(columns, None, str(folder))
        return _saved_source(folder, split, key)
    notes: list[str] = []
    split_key = key_beside(key, "split")
    files = find_split(folder, split, key=key, split_key=split_key, notes=notes)
    source = _files_source(f"{folder} ({split})", files, columns, notes)
    return replace(source, class_names={**names, **source.class_names})


def _saved_source(folder: Path, split: str, key: str) -> Source:
    """A folder of `datasets.save_to_disk`: one split, or a folder a split."""
    if (folder / "dataset_dict.json").is_file():
        splits = or_refuse(
            _read_splits, folder / "dataset_dict.json", f"{key}: {folder}/dataset_dict.json cannot be read"
        )
        if split not in splits:
            raise UserError(f"{key}: {folder} has no split {split!r}; it has {', '.join(splits)}")
        folder = folder / split
    told = f"{key}: {folder}"
    state = or_refuse(_read_saved, folder / "state.json", f"{told}/state.json cannot be read")
    files = [each["filename"] for name in ("_data_files", "_indices_data_files") for each in state.get(name) or ()]
    if outside := next((name for name in files if Path(name).name != name), None):
        raise UserError(f"{told}/state.json names the file {shown(outside)}, which lies outside the folder")
    shards = [folder / name for name in files]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{key}: {folder} names the file {shard.name}, which is not there")
    content = digest_of([folder / "state.json", *shards])
    info = or_refuse(_read_saved, folder / "dataset_info.json", f"{told}/dataset_info.json cannot be read")

    def load() -> Any:
        try:
            return import_module("datasets").load_from_disk(folder)
        except Exception as error:  # what the files hold decides what `datasets` raises
            raise UserError(f"{told} cannot be read as what save_to_disk wrote: {first_line(error)}") from error

    names = features_class_names(info.get("features") or {})
    return Source(f"{folder} ({split})", content, lambda: read_dataset(load()), class_names=names)


class _Shard(TypedDict):
    filename: str


class _Saved(TypedDict, total=False):
    """The keys that are read of the files of `datasets.save_to_disk`."""

    splits: list[str]
    _data_files: list[_Shard]
    _indices_data_files: list[_Shard] | None
    features: dict[str, Any] | None


_SAVED = TypeAdapter(_Saved)


def _read_saved(file: Path) -> dict[str, Any]:
    return dict(read_json(file, _SAVED))


def _read_splits(file: Path) -> list[str]:
    splits: list[str] = _read_saved(file).get("splits", [])
    if outside := next((name for name in splits if Path(name).name != name), None):
        raise Unreadable(f"the split {shown(outside)} is no name of a folder")
    return splits


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
