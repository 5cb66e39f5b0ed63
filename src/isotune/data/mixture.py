"""Several sources as one, in shares that a recipe says: which rows, in which order, decided by contents and the seed.

    weight     how often each row of a source is read: 1 all rows, 0.5 half of them, 2.5 all twice and half once more
    fraction   the share that a source has of the mixture, which is as large as it can be with no row read twice

The rows of a source that are read in part are drawn without replacement, by the seed and the content of that source:
another source, or another order of them, changes nothing about it. How many there are is known when they have been
read once.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from isotune.config import RunRecipe
from isotune.config.mixture import FRACTION, NAME, WEIGHT, mixture_name
from isotune.data.class_index import NameIndex, label_of, place_of
from isotune.data.documents import Documents, digest, with_share
from isotune.data.sources.class_labels import ClassNames, fold
from isotune.data.sources.files import BorrowedColumns
from isotune.data.sources.source import Row, Source, read_rows
from isotune.io.errors import UserError

EVALUATED = "test"  # the split of an entry of eval_dataset_mixture that names none


@dataclass(frozen=True)
class Part:
    """One source of a mixture, and how much of it is read."""

    source: Source
    weight: float | None
    fraction: float | None
    columns: tuple[str, ...] | None  # that are kept; None: all
    seed: tuple[int, ...]  # of the choice among its rows

    @property
    def in_part(self) -> bool:
        """Whether some of its rows are chosen, so that their number has to be known."""
        return self.fraction is not None or not float(self.weight or 0).is_integer()

    def rows(self, names: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[int, Row]]:
        """Its rows, each with its number; what stands for a class becomes its name in the columns of `names`."""
        classes = {column: NameIndex(own) for column, own in names.items()}
        for number, row in enumerate(self.source.rows()):
            if self.columns is not None:
                for column in self.columns:
                    if column not in row:
                        raise self.source.lacks(number, row, column, "columns")
                row = {column: row[column] for column in self.columns}
            yield number, row | {name: _named(row[name], own) for name, own in classes.items() if name in row}


@dataclass(frozen=True)
class Reading:
    """One pass over a part, which begins at row `first` of the mixture."""

    part: int
    first: int
    chosen: np.ndarray | None  # bool [rows of the source]; None: all


@dataclass(frozen=True)
class Mixture(Source):
    """A source made of others; its rows are those of one after the other."""

    parts: tuple[Part, ...] = ()
    readings: list[Reading] = field(default_factory=list[Reading], repr=False, compare=False)
    sizes: dict[int, int] = field(default_factory=dict[int, int], repr=False, compare=False)  # rows of parts, as known
    progress: dict[str, int] = field(default_factory=dict[str, int], repr=False, compare=False)  # `rows` read so far

    def where(self, row: int) -> str:
        """How an error sentence names a row: by the source that it is of."""
        part, own = self._place(row)
        return self.parts[part].source.where(own)

    def lacks(self, number: int, row: Row, column: str, key: str) -> UserError:
        """The error of a row that lacks a column, by the source that it is of."""
        part, own = self._place(number)
        return self.parts[part].source.lacks(own, row, column, key)

    def part_of(self, row: int) -> int:
        """Which of the parts a row is of."""
        return self._reading(row).part

    def _reading(self, row: int) -> Reading:
        if row >= self.progress.get("rows", 0):  # not read, or only in part, by whoever asks
            deque(self.rows(), maxlen=0)
        return next(each for each in reversed(self.readings) if each.first <= row)

    def _place(self, row: int) -> tuple[int, int]:
        reading = self._reading(row)
        own = row - reading.first
        return reading.part, own if reading.chosen is None else int(np.flatnonzero(reading.chosen)[own])

    def counted(self, documents: Documents) -> list[dict[str, int]]:
        """What each part gave to documents whose `source_rows` are rows of this mixture, as far as it has been read."""
        parts = range(len(self.parts))
        found = [{"rows": 0, "of": self.sizes.get(part, 0), "documents": 0, "tokens": 0} for part in parts]
        ends = [each.first for each in self.readings[1:]] + [np.iinfo(np.int64).max]
        for reading, end in zip(self.readings, ends, strict=True):
            of_part = (documents.source_rows >= reading.first) & (documents.source_rows < end)
            every = self.sizes.get(reading.part, int(of_part.sum()))
            taken = every if reading.chosen is None else int(reading.chosen.sum())
            counts = {"rows": taken, "documents": of_part.sum(), "tokens": documents.lengths[of_part].sum()}
            found[reading.part] |= {name: found[reading.part][name] + int(own) for name, own in counts.items()}
        return found


def open_mixture(
    entries: Sequence[Mapping[str, Any]], seed: int, *, split: str = "train", key: str = "dataset_mixture"
) -> Mixture:
    """The source that the entries of `dataset_mixture`, or another `key`, describe; UserError where one is not there.

    `split` is that of an entry which names none.
    """
    parts: list[Part] = []
    for entry in entries:
        source = read_rows(
            entry[NAME],
            entry.get("dataset_split", split),
            columns=entry.get("dataset_columns"),
            config=entry.get("dataset_config"),
            revision=entry.get("dataset_revision"),
        )
        again = sum(part.source.fingerprint == source.fingerprint for part in parts)
        if again and FRACTION in entry:
            raise UserError(f"{key} has the rows of {source.name} twice: add the fractions, in one entry")
        own_seed = hashlib.sha256(f"{seed} {source.fingerprint} {again}".encode()).digest()
        columns = tuple(entry["columns"]) if "columns" in entry else None
        numbers = tuple(np.frombuffer(own_seed, np.uint32).tolist())
        parts.append(Part(source, entry.get(WEIGHT), entry.get(FRACTION), columns, numbers))
    in_part = any(part.in_part for part in parts)
    names, by_part = _class_names(parts)
    shares = [[part.source.fingerprint, part.weight, part.fraction, part.columns] for part in parts]
    content = [*shares, names, by_part]
    notes: list[str] = []
    mixture: Mixture

    def read() -> Iterator[Row]:
        mixture.readings.clear()
        mixture.progress["rows"] = count = 0
        for number, chosen in _passes(mixture, key):
            part = parts[number]
            mixture.readings.append(Reading(number, count, chosen))
            size = 0
            for own, row in part.rows(by_part[number]):
                size += 1
                if chosen is None or chosen[own]:
                    count += 1
                    mixture.progress["rows"] = count
                    yield row
            mixture.sizes[number] = size
        notes[:] = list(dict.fromkeys(note for part in parts for note in part.source.notes))
        if parts[0].fraction is not None:
            notes.append("fraction is a share of the mixture, no row is read twice, and the seed chooses the rows")

    mixture = Mixture(
        f"the mixture of {mixture_name(entries)}",
        digest("mixture", seed if in_part else None, content),
        read,
        notes,
        class_names=names,
        parts=tuple(parts),
    )
    return mixture


def _passes(mixture: Mixture, key: str) -> Iterator[tuple[int, np.ndarray | None]]:
    """The parts in the order in which they are read, each as often as it is, with its chosen rows; None for all."""

    def size_of(number: int) -> int:
        if number not in mixture.sizes:
            mixture.sizes[number] = sum(1 for _ in mixture.parts[number].source.rows())
        return mixture.sizes[number]

    fractions = [part.fraction or 0.0 for part in mixture.parts]
    largest = 0.0  # rows of the whole mixture
    if any(fractions):
        largest = min(size_of(n) / (own / sum(fractions)) for n, own in enumerate(fractions) if own)
    for number, part in enumerate(mixture.parts):
        if part.weight is not None and not part.in_part:
            yield from [(number, None)] * int(part.weight)
            continue
        size = size_of(number)
        wanted = size * part.weight if part.weight is not None else fractions[number] / sum(fractions) * largest
        whole, rest = divmod(round(wanted), size)
        if not whole and not rest:
            raise UserError(f"{key}: the share of {part.source.name} is none of its {size} rows")
        yield from [(number, None)] * whole
        if rest:
            chosen = np.zeros(size, bool)
            chosen[np.random.default_rng(part.seed).permutation(size)[:rest]] = True
            yield number, chosen


def _class_names(parts: Sequence[Part]) -> tuple[ClassNames, list[dict[str, tuple[str, ...]]]]:
    """The names of the classes of each column, and by part those by which its numbers are replaced.

    Two sources may number the same names in other orders, and one may have the words themselves. Where all have a list,
    of the same names, that of the first counts; else the words are resolved as those of one source are.
    """
    columns = {column for part in parts for column in part.source.class_names}
    names: ClassNames = {}
    by_part: list[dict[str, tuple[str, ...]]] = [{} for _ in parts]
    for column in sorted(columns):
        lists = [part.source.class_names.get(column) for part in parts]
        if all(own == lists[0] for own in lists) and lists[0]:
            names[column] = lists[0]
            continue
        for number, own in enumerate(lists):
            if own:
                by_part[number][column] = own[0]
        if lists[0] and len({frozenset(map(fold, own[0])) if own else None for own in lists}) == 1:
            names[column] = lists[0]
    return names, by_part


def _named(cell: Any, classes: NameIndex) -> Any:
    """The name of the class in a cell, or in each item of a list, however it is written; else the cell as it is."""
    if isinstance(cell, list | tuple):
        return [_named(one, classes) for one in cast("Sequence[Any]", cell)]
    with suppress(ValueError):
        place = place_of(label_of(cell, classes.names), classes)
        if place is not None:
            return classes.names[place]
    return cell


def training_source(recipe: RunRecipe) -> Source:
    """What a recipe trains on: its `dataset_name`, or its `dataset_mixture`."""
    if recipe.dataset_mixture is not None:
        return open_mixture(recipe.dataset_mixture, recipe.seed)
    return read_rows(
        recipe.dataset_name,
        recipe.dataset_split,
        columns=recipe.dataset_columns,
        config=recipe.dataset_config,
        revision=recipe.dataset_revision,
    )


def evaluation_columns(columns: Sequence[str] | None) -> BorrowedColumns | None:
    """`dataset_columns` for the evaluation data, which may be a file of another form than the training data."""
    return BorrowedColumns(columns) if columns else None


def evaluation_source(recipe: RunRecipe) -> Source:
    """What a recipe evaluates on: its `eval_dataset_name`, or its `eval_dataset_mixture`."""
    if recipe.eval_dataset_mixture is not None:
        return open_mixture(recipe.eval_dataset_mixture, recipe.seed, split=EVALUATED, key="eval_dataset_mixture")
    assert recipe.eval_dataset_name is not None
    return read_rows(
        recipe.eval_dataset_name,
        recipe.eval_dataset_split,
        name="eval_dataset_name",
        columns=evaluation_columns(recipe.dataset_columns),
        config=recipe.eval_dataset_config,
        revision=recipe.eval_dataset_revision,
    )


def count_parts(source: Source, documents: Documents) -> dict[str, Any]:
    """The counts of a mixture by its parts, for the cache; none of any other source."""
    return {"mixture": source.counted(documents)} if isinstance(source, Mixture) else {}


def name_parts(source: Source, counts: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the names of the parts, which the cache does not keep: equal content may lie elsewhere."""
    if not isinstance(source, Mixture):
        return {}
    named = zip(source.parts, counts["mixture"], strict=True)
    return {"mixture": [{"source": part.source.name, **own} for part, own in named]}


def mixture_lines(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of a table of counts about the parts of a mixture."""
    parts: list[dict[str, Any]] = counts.get("mixture", [])
    tokens = sum(part["tokens"] for part in parts)
    return [
        (
            f"  of {part['source']}",
            f"{part['rows']:,} rows, of {part['of']:,}; {with_share(part['tokens'], tokens)} of the tokens",
        )
        for part in parts
    ]
