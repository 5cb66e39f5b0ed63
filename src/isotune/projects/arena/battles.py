"""Reads the Chatbot Arena's files: two answers to one prompt, and which of them a person preferred.

A row of Kaggle's `train.csv` (LLM Classification Finetuning) has an `id`, `prompt`, `response_a` and `response_b`, each
a JSON list in a string with one text a turn, and the flags `winner_model_a`, `winner_model_b` and `winner_tie`. Who
wrote an answer (`model_a`, `model_b`) is not read: no test row says it.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isotune.data.sources.csv_rows import read_cells
from isotune.data.sources.text_files import undecoded
from isotune.io.errors import UserError, shown

ID = "id"
TEXTS = ("prompt", "response_a", "response_b")
REPAIRS: tuple[str, ...] = ("null_turns", "lone_surrogates")
CLASSES = ("winner_model_a", "winner_model_b", "winner_tie")
WINS_A, WINS_B, TIE = range(3)
SWAPPED_CLASSES = (WINS_B, WINS_A, TIE)
TRAIN, TEST, SAMPLE = "train.csv", "test.csv", "sample_submission.csv"
UNREADABLE_CHARACTER = "\ufffd"
HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Battle:
    """Two answers to one prompt, each with a text a turn; `label` is one of WINS_A, WINS_B and TIE, or None."""

    id: str
    prompt: tuple[str, ...]
    answer_a: tuple[str, ...]
    answer_b: tuple[str, ...]
    label: int | None = None

    def group(self) -> str:
        """A digest that battles over the same prompt share: letter case and white space make no difference.

        Battles without any prompt share nothing by that, so those are told apart by their two answers, in any order.
        """
        prompt = _normal(self.prompt)
        answers = [] if prompt else sorted([_normal(self.answer_a), _normal(self.answer_b)])
        return hashlib.sha256(json.dumps([prompt, *answers]).encode()).hexdigest()


@dataclass(frozen=True)
class Battles:
    """The rows of one file, in its order, with counts of what was repaired to read them."""

    name: str
    battles: tuple[Battle, ...]
    null_turns: int
    lone_surrogates: int

    def __len__(self) -> int:
        return len(self.battles)

    @property
    def labels(self) -> np.ndarray:
        """The class of every row: int64 [rows]."""
        return np.array([battle.label for battle in self.battles], np.int64)

    def subset(self, rows: Sequence[int]) -> "Battles":
        """Some rows, by number, in that order; the repairs are still counted over all."""
        return replace(self, battles=tuple(self.battles[row] for row in rows))

    def table(self) -> str:
        """What was read, as lines to print."""
        lines = [("rows", f"{len(self):,}"), ("prompts", f"{len({b.group() for b in self.battles}):,}")]
        if all(battle.label is not None for battle in self.battles):
            counts = np.bincount(self.labels, minlength=3)
            lines += [(f"  {name}", f"{n:,} ({n / len(self):.1%})") for name, n in zip(CLASSES, counts, strict=True)]
        for name, count in (("null turns, read as empty", self.null_turns),
                            ("halves of surrogate pairs, replaced", self.lone_surrogates)):  # fmt: skip
            lines += [(name, f"{count:,}")] if count else []
        width = max(len(name) for name, _ in lines)
        return "\n".join([self.name, *(f"  {name:<{width}}  {value}" for name, value in lines)])


@dataclass(frozen=True)
class Competition:
    """The files of a folder: labelled rows, those to predict, and the sample submission (None where there is none)."""

    train: Battles
    test: Battles
    sample: Path | None


def read_competition(folder: Path) -> Competition:
    """Read the competition's files; raises UserError if one is missing or a row is broken, see `read_battles`."""
    for needed in (TRAIN, TEST):
        if not (folder / needed).is_file():
            raise UserError(f"dataset_name: {folder} has no {needed}: name the folder of the competition's files")
    train, test = read_battles(folder / TRAIN, labelled=True), read_battles(folder / TEST, labelled=False)
    return Competition(train, test, folder / SAMPLE if (folder / SAMPLE).is_file() else None)


def read_battles(file: Path, *, labelled: bool) -> Battles:
    """All rows of a file of the Arena; if they are not `labelled`, what they say of the winner is left unread.

    A null turn is read as an empty text, half of a surrogate pair as U+FFFD, and both are counted. Raises UserError if
    there is no such file, a column is missing, an id stands twice, or a row is broken: the first one is named.
    """
    battles: list[Battle] = []
    first_row: dict[str, int] = {}
    counts = dict.fromkeys(REPAIRS, 0)
    for number, row in read_table(file, (ID, *TEXTS, *(CLASSES if labelled else ()))):
        where = f"{file}, row {number} (id {row['id']})"
        if not row["id"]:
            raise UserError(f"{file}, row {number}: the id is empty")
        if row["id"] in first_row:
            raise UserError(f"{where}: the id stands in row {first_row[row['id']]} too")
        first_row[row["id"]] = number
        battle = battle_of(row["id"], row, where, counts)
        battles.append(replace(battle, label=label_of(row, where)) if labelled else battle)
    if not battles:
        raise UserError(f"{file} holds no rows")
    return Battles(str(file), tuple(battles), **counts)


def battle_of(own_id: str, row: Mapping[str, Any], where: str, counts: dict[str, int]) -> Battle:
    """The battle of a row that has the columns TEXTS; `counts` takes the repairs by their names in REPAIRS.

    UserError names the row by `where` if a cell is no list of texts, or they differ in their turns.
    """
    prompt, answer_a, answer_b = (_turns(row[column], f"{where}, column {column}", counts) for column in TEXTS)
    if not len(prompt) == len(answer_a) == len(answer_b):
        raise UserError(
            f"{where}: {len(prompt)} turns of prompt, {len(answer_a)} of response_a, {len(answer_b)} of response_b"
        )
    return Battle(own_id, prompt, answer_a, answer_b)


def read_table(file: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file as text, with their numbers; UserError if a column of `needed` or a cell is missing."""
    rows = read_rows(file)
    _, header, _ = next(rows, (0, [], 0))
    for column in needed:
        if column not in header:
            raise UserError(f"{file} lacks the column {column!r}; it has {', '.join(header) or 'none'}")
    for number, cells, line in rows:
        if len(cells) != len(header):
            raise UserError(f"{file}, row {number} (to line {line}): {len(cells)} cells, {len(header)} columns")
        yield number, dict(zip(header, cells, strict=True))


def read_rows(file: Path) -> Iterator[tuple[int, list[str], int]]:
    """Number, cells and last line of a CSV file's header (0) and rows that are not empty; UserError if it is broken."""
    number = -1
    try:
        for cells, line in read_cells(file):
            if fault := undecoded("".join(cells)):
                raise UserError(f"{file}, row {number + 1} (to line {line}), {fault}")
            if cells or number < 0:
                number += 1
                yield number, cells, line
    except csv.Error as error:
        raise UserError(f"{file}, row {number + 1}, is not CSV: {error}") from None


def _turns(cell: Any, where: str, counts: dict[str, int]) -> tuple[str, ...]:
    """The texts of a cell: a list of strings and nulls, as JSON in a file of CSV."""
    try:
        turns: Any = json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list) or not turns or not all(turn is None or isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: no JSON list of texts: {shown(cell, 40)}")
    counts["null_turns"] += sum(turn is None for turn in turns)
    texts = []
    for turn in turns:
        text, halves = HALF_OF_A_PAIR.subn(UNREADABLE_CHARACTER, turn or "")
        counts["lone_surrogates"] += halves
        texts.append(text)
    return tuple(texts)


def label_of(row: dict[str, str], where: str) -> int:
    """The class that a row's flags say; raises UserError, naming the row by `where`, unless one of them is 1."""
    flags = [row[column].strip() for column in CLASSES]
    if sorted(flags) != ["0", "0", "1"]:
        given = ", ".join(f"{column} {flag!r}" for column, flag in zip(CLASSES, flags, strict=True))
        raise UserError(f"{where}: one winner is 1 and the others are 0, but here {given}")
    return flags.index("1")


def _normal(texts: tuple[str, ...]) -> str:
    return " ".join(" ".join(texts).casefold().split())
