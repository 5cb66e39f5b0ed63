"""Finds the files of a split in a folder, in the layouts that the Hub's data sets have.

    train.jsonl   data/train-00000-of-00002.parquet   data/train-00000-of-00001-0d1e2f3a4b5c6d7e.parquet
    plain_text/train-00000-of-00001.parquet   default/train/0000.parquet   openassistant_best_replies_train.jsonl

A split is named, the strongest first, by a file's whole name, by the folder that holds the file, by a word of the
file's name, or of its folder's; files that name no split at all are the split `train`. Files of a split are read
together where they are the shards of one table; else the user is asked for one of them.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from isotune.io.errors import UserError
from isotune.io.formats import FORMAT_WORDS, PLAIN_TEXT, base_name, format_of

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# what stands beside the data and is none
NOT_DATA = frozenset(
    (
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"),
        *("metadata.json", "MANIFEST.json", "status.json"),  # the last two of a checkpoint and a run
    )
)
SHOWN_FILES = 6
_SHARD = re.compile(r"(?P<base>.+?)-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-fA-F]{8,})?")
_NO_WORD = re.compile(r"[^a-zA-Z]+")
# a number beside one of these words tells tables apart, and not the parts of one: fold0, v1.1, 10k
_OWN_TABLE = re.compile(
    r"(?<![a-z])(?:fold|cv|seed|version|ver|v|k)[ _-]?\d+(?:\.\d+)*|\d+(?:k|m|pct|percent)(?![a-z])", re.I
)


@dataclass(frozen=True)
class DataFile:
    """A file of a folder that holds rows."""

    path: Path
    folder: Path  # where the search began

    @cached_property
    def place(self) -> Path:
        """The path within the folder."""
        return self.path.relative_to(self.folder)

    @cached_property
    def stem(self) -> str:
        """The name without its ends, which name format and compression."""
        return Path(base_name(self.path)).stem

    @cached_property
    def shard(self) -> tuple[int, int] | None:
        """Its number and the count of all, where the name says them (-00001-of-00003)."""
        match = _SHARD.fullmatch(self.stem)
        return (int(match["number"]), int(match["count"])) if match else None

    @cached_property
    def base(self) -> str:
        """The name of the whole table: the stem without what tells shards apart."""
        match = _SHARD.fullmatch(self.stem)
        return match["base"] if match else self.stem

    @cached_property
    def table(self) -> tuple[str, ...]:
        """What the shards of one table share: folder, name but for numbers, and format."""
        kept = [match.span() for match in _OWN_TABLE.finditer(self.base)]

        def shard_number(match: re.Match[str]) -> str:
            return match[0] if any(begin <= match.start() < end for begin, end in kept) else "0"

        name = re.sub(r"\d+", shard_number, self.base)
        return (str(self.place.parent), name, self.path.name[len(self.stem) :])

    @cached_property
    def names(self) -> tuple[str | None, ...]:
        """The split by each way of naming one, the strongest first; None where it names none."""
        folders = self.place.parent.parts[::-1]  # the nearest first
        words = [word for part in (self.base, *folders) if (word := _split_word(part))]
        folder = next((name for name in folders if name.lower() in SPLIT_WORDS), None)
        whole = self.base if self.base.lower() in SPLIT_WORDS else None
        return whole, folder, next(iter(words), None)

    @property
    def split(self) -> str:
        """The split that it is listed under."""
        return next((name for name in self.names if name), self.base)


def _split_word(name: str) -> str | None:
    """The split that a word of a name stands for; None where it has none, or those of several."""
    found = {SPLIT_WORDS[word] for word in _NO_WORD.split(name.lower()) if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def find_split(folder: Path, split: str, *, key: str, split_key: str, notes: list[str]) -> list[Path]:
    """The files of a split in their order; UserError, which calls the recipe's keys `key` and `split_key`, for none.

    Files of the same split that are named less clearly are not read; `notes` get their names.
    """
    everything = sorted(_files_in(folder))
    files = [DataFile(path, folder) for path in everything if format_of(path) and path.name not in NOT_DATA]
    # beside data a .txt file is a licence or a description
    files = [file for file in files if format_of(file.path) != PLAIN_TEXT] or files
    if not files:
        seen = _listed([path.relative_to(folder) for path in everything])
        raise UserError(f"{key}: the folder {folder} has no {FORMAT_WORDS} file, at any depth; it has {seen}")
    by_rank = _by_rank(files, split)
    if not by_rank:
        splits = sorted({file.split for file in files})
        raise UserError(
            f"{key}: the folder {folder} has no file for the split {split!r}; it has "
            f"{', '.join(splits[:SHOWN_FILES])}: choose one by {split_key} ({_listed([f.place for f in files])})"
        )
    chosen, *weaker = by_rank
    _check_one_table(chosen, folder, split, key)
    _check_shards(chosen, key)
    if len(chosen) > 1 and not all(file.shard for file in chosen):
        notes.append(f"read together as {split!r}: {_listed([file.place for file in _in_order(chosen)])}")
    if left := [file.place for others in weaker for file in others]:
        notes.append(f"not read as {split!r}: {_listed(left)}")
    return [file.path for file in _in_order(chosen)]


def _in_order(files: list[DataFile]) -> list[DataFile]:
    """The files of a table by their numbers."""
    return sorted(files, key=lambda file: _natural(str(file.place)))


def _files_in(folder: Path) -> Iterator[Path]:
    """Every file at any depth, but for hidden ones such as those of .git and .cache.

    A folder that is a link is entered too, unless what it leads to was read already: by its own name, or by a link.
    """
    seen: set[str] = set()
    tops = [folder]
    while tops:
        links: list[Path] = []
        for top in sorted(tops):
            for root, folders, names in os.walk(top):
                if (real := os.path.realpath(root)) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [path for name in folders if (path := Path(root, name)).is_symlink()]  # walk enters none
                yield from (Path(root, name) for name in names if not name.startswith("."))
        tops = links


def _by_rank(files: list[DataFile], split: str) -> list[list[DataFile]]:
    """The files of a split, in lists by how clearly they name it, the clearest first; without empty lists."""
    wanted = SPLIT_WORDS.get(split.lower(), split)
    ranks: dict[int, list[DataFile]] = defaultdict(list)
    for file in files:
        folders = file.place.parent.parts
        if file.base == split:
            ranks[0].append(file)
            continue
        # the first way that names a split says which; a weaker one does not contradict it
        strongest = next(((rank, name) for rank, name in enumerate(file.names, start=1) if name), None)
        if strongest and SPLIT_WORDS.get(strongest[1].lower()) == wanted:
            ranks[strongest[0]].append(file)
        elif strongest is None and split in folders:
            ranks[2].append(file)
    if not ranks and wanted == "train" and not any(name for file in files for name in file.names):
        ranks[4] = files
    return [ranks[rank] for rank in sorted(ranks)]


def _check_one_table(chosen: list[DataFile], folder: Path, split: str, key: str) -> None:
    tables = {file.table: file for file in reversed(chosen)}
    has_whole = any(file.shard is None and file.base == split for file in chosen)  # train.csv beside its shards
    if len(tables) > 1 or (has_whole and len(chosen) > 1):
        some = [file.place for file in sorted(tables.values() if len(tables) > 1 else chosen, key=lambda f: f.path)]
        raise UserError(
            f"{key}: the split {split!r} lies in {folder} more than once ({_listed(some)}): name one file, or the "
            "folder of one of them"
        )


def _check_shards(chosen: list[DataFile], key: str) -> None:
    """Raise UserError where names promise shards that are not there, or two have the same number."""
    tables: dict[str, list[DataFile]] = defaultdict(list)
    for file in chosen:
        if file.shard:
            tables[file.base].append(file)
    for base, files in tables.items():
        numbers = sorted(file.shard[0] for file in files if file.shard)
        counts = {file.shard[1] for file in files if file.shard}
        folder = files[0].path.parent
        if len(counts) > 1 or len(set(numbers)) < len(numbers):
            raise UserError(
                f"{key}: {folder} holds shards of two tables {base!r} ({_listed([f.place for f in files])}): keep one"
            )
        (count,) = counts
        if lacks := _lacks(base, count, numbers, files[0]):
            raise UserError(f"{key}: {folder} {lacks}")


def lacking_shards(paths: Sequence[Path], root: Path) -> str | None:
    """What files that somebody else chose lack by their names, as the end of a sentence; None where it is nothing.

    Shards that lie beside them were left out on purpose.
    """
    tables: dict[tuple[Path, str, int], list[DataFile]] = defaultdict(list)
    for file in (DataFile(path, root) for path in paths):
        if file.shard:
            tables[file.path.parent, file.base, file.shard[1]].append(file)
    for (folder, base, count), files in tables.items():
        beside = [DataFile(path, root) for path in folder.iterdir()] if folder.is_dir() else []
        there = [file for file in (*files, *beside) if file.base == base and file.shard and file.shard[1] == count]
        if lacks := _lacks(base, count, sorted({file.shard[0] for file in there if file.shard}), files[0]):
            return lacks
    return None


def _lacks(base: str, count: int, numbers: list[int], example: DataFile) -> str | None:
    """Which of the shards of a table are not among these, which are numbered from 0 or from 1, in their order."""
    first = 1 if numbers[-1] == count else 0
    missing = sorted(set(range(first, first + count)) - set(numbers))
    if not missing:
        return None
    name = re.sub(r"-\d+-of-", f"-{missing[0]:05d}-of-", example.path.name, count=1)
    return f"lacks {len(missing)} of the {count} shards of {base!r}, first {name}: fetch it"


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts part2 before part10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _listed(paths: list[Path]) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else ""
    return (", ".join(map(str, paths[:SHOWN_FILES])) or "no file at all") + more
