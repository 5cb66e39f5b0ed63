"""Documents and rows as flat arrays, so that millions of them are mapped from disk and never become Python objects.

Both are kept in compressed sparse row form: one long array of values and `starts`, where item `i` owns
`values[starts[i] : starts[i + 1]]`. Here too is what both tasks share of preparing them: the settings that go in, and
the prepared data with the table of their counts that come out.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import numpy as np

from isotune.config.task_types import SINGLE_LABEL
from isotune.io.errors import VALUES, UserError

# A column of documents of two texts each: how many of a document's tokens, from its start, are of token type 0; the
# others are of type 1
FIRST_TYPE = "first_type_tokens"
QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


def digest(*parts: Any) -> str:
    """SHA-256, in hexadecimal, of parts that JSON can hold; it names prepared data."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where each item starts and the last one ends, int64 [items + 1], given the length of each, [items]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def located(starts: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of some items starts when they lie end to end, int64 [items + 1], and the places of their parts.

    Item k has the places from `starts[k]` to `starts[k + 1]`.
    """
    first = starts[items]
    own = starts_of(starts[items + 1] - first)
    return own, np.arange(int(own[-1])) + np.repeat(first - own[:-1], np.diff(own))


def sums_of(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sum of each item's values: int64 [items]."""
    return np.diff(starts_of(values)[starts])


@dataclass(frozen=True)
class Documents:
    """Tokenized documents with their targets, for both tasks.

    starts     0           3       5
    input_ids  2   8   9 | 2   7 |        two documents, of three and two tokens
    targets    .   .   x | .   x |        SFT: x is a supervised token, predicted from the token before it
    targets    1         | 0     |        classification: the class of each document
    """

    input_ids: np.ndarray  # int32 [tokens], special tokens in place
    # bool [tokens], the supervised mask, for SFT: nothing stands before the first token of a document, so that one is
    # never supervised. Of classification int32 [documents], the classes from 0; float64 [documents], the numbers of a
    # regression; or uint8 [documents, labels], whether a document has a label
    targets: np.ndarray
    starts: np.ndarray  # int64 [documents + 1]
    source_rows: np.ndarray  # int64 [documents]; the row of the source, counted from 0, that the document comes from
    # further arrays by name, each [documents]. `ids` names the documents in predictions: the data set's own id where it
    # has one, else the source row
    columns: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])

    def __len__(self) -> int:
        return len(self.source_rows)

    @property
    def has_labels(self) -> bool:
        """Whether each document has one target, its class or its like; else its supervised tokens are the targets."""
        return self.targets.dtype != np.bool_

    @property
    def supervised(self) -> np.ndarray:
        """The supervised mask of SFT: bool [tokens]."""
        assert not self.has_labels, "these documents have a class each and no supervised tokens"
        return self.targets

    @property
    def labels(self) -> np.ndarray:
        """The classes of classification, int32 [documents], or the numbers or labels in their place."""
        assert self.has_labels, "these documents have supervised tokens and no classes"
        return self.targets

    @property
    def ids(self) -> np.ndarray:
        """What predictions name the documents by: int64 or text [documents], each once."""
        return self.columns["ids"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [documents]."""
        return np.diff(self.starts)

    @property
    def supervised_counts(self) -> np.ndarray:
        """Targets of each document, int64 [documents]: its supervised tokens, or its one class."""
        return np.ones(len(self), np.int64) if self.has_labels else sums_of(self.targets, self.starts)

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `starts` of some documents when they lie end to end, and the positions of their tokens in `input_ids`."""
        return located(self.starts, documents)

    def select(self, chosen: np.ndarray) -> Self:
        """Some of the documents: a mask, bool [documents], or document numbers in the order wanted."""
        if chosen.dtype == np.bool_:
            starts = starts_of(self.lengths[chosen])
            tokens = np.repeat(chosen, self.lengths)  # one byte a token, where positions would take eight
        else:
            starts, tokens = self.locate(chosen)
        return type(self)(
            input_ids=self.input_ids[tokens],
            targets=self.targets[chosen if self.has_labels else tokens],
            starts=starts,
            source_rows=self.source_rows[chosen],
            columns={name: values[chosen] for name, values in self.columns.items()},
        )

    @classmethod
    def concat(cls, parts: Sequence["Documents"]) -> Self:
        """The documents of all parts, one part after the other; all have the columns of the first."""
        return cls(
            input_ids=np.concatenate([part.input_ids for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            starts=starts_of(np.concatenate([part.lengths for part in parts])),
            source_rows=np.concatenate([part.source_rows for part in parts]),
            columns={name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    def as_arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, as the cache keeps them."""
        return {
            "input_ids": self.input_ids,
            "labels" if self.has_labels else "supervised": self.targets,
            "starts": self.starts,
            "source_rows": self.source_rows,
            **self.columns,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The documents of `as_arrays`."""
        columns = dict(arrays)
        targets = columns.pop("labels" if "labels" in columns else "supervised")
        return cls(columns.pop("input_ids"), targets, columns.pop("starts"), columns.pop("source_rows"), columns)


@dataclass(frozen=True)
class Rows:
    """Which documents share a row, in every epoch or, where these have texts of their own, in one after the other."""

    documents: np.ndarray  # int64 [documents]; document numbers, row after row
    starts: np.ndarray  # int64 [epochs * rows + 1]
    epochs: int = 1  # that have rows of their own; the rows of epoch 0 first, then as many of epoch 1, ...

    def __len__(self) -> int:
        """Rows of an epoch."""
        return (len(self.starts) - 1) // self.epochs

    def __getitem__(self, row: int) -> np.ndarray:
        """The numbers of the documents in a row, counted over all epochs: int64 [documents in the row]."""
        return self.documents[self.starts[row] : self.starts[row + 1]]

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of some rows starts when they lie end to end, [rows + 1], and their documents: both int64."""
        starts, places = located(self.starts, rows)
        return starts, self.documents[places]

    def of_epoch(self, epoch: int) -> int:
        """The number of the first row of an epoch; where no epoch has rows of its own, or after the last, from 0 on."""
        return epoch % self.epochs * len(self)

    def lengths(self, document_lengths: np.ndarray) -> np.ndarray:
        """Tokens of each row, int64 [epochs * rows], given the tokens of each document, [documents]."""
        return sums_of(document_lengths[self.documents], self.starts)


@dataclass(frozen=True)
class CountsTable:
    """What preparation did to a data set, counted; `str()` is the table to print."""

    source: str  # where the rows came from
    counts: dict[str, Any]  # plain numbers by name, for a JSON file
    lines: tuple[tuple[str, str], ...]  # what is printed, name and value; then the quantiles of the whole lengths

    @staticmethod
    def quantiles(lengths: np.ndarray) -> dict[str, int]:
        """Lengths that really occur, at the shares of QUANTILES: tokens by name."""
        if not len(lengths):
            return {}
        values = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
        return {name: int(tokens) for name, tokens in zip(QUANTILES, values, strict=True)}

    def as_dict(self) -> dict[str, Any]:
        """The source and its counts, for a JSON file."""
        return {"source": self.source, **self.counts}

    def __str__(self) -> str:
        quantiles = "  ".join(f"{name} {tokens:,}" for name, tokens in self.counts["whole_lengths"].items())
        lines = [*self.lines, ("tokens of a whole document", quantiles)]
        width = max(len(name) for name, _ in lines)
        return "\n".join([self.source, *(f"  {name:<{width}}  {value}" for name, value in lines)])


NOTES = 6  # shown of a data set
WARNED_SHARE, REFUSED_SHARE = 0.05, 0.5  # of the rows that are left out


def note_lines(notes: Sequence[str]) -> list[tuple[str, str]]:
    """Lines of a table for what reading guessed or left out."""
    more = [f"and {len(notes) - NOTES:,} more"] if len(notes) > NOTES else []
    return [("note", note) for note in [*notes[:NOTES], *more]]


def check_left_out(name: str, read: int, left_out: Mapping[str, int], *, allowed: bool, show: bool) -> None:
    """Warn of rows of a data set that are left out, which are counted by reason, where they are many.

    UserError where they are most of the `read` rows, unless that is `allowed`; `show` asks for the warning on stdout.
    """
    count = sum(left_out.values())
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items() if number)
    sentence = f"{count:,} of the {read:,} rows of {name} are left out ({reasons})"
    if count > read * REFUSED_SHARE and not allowed:
        raise UserError(f"{sentence}: allow_dropped: true goes on without them")
    if count > read * WARNED_SHARE and show:
        print(f"warning     {sentence}", flush=True)


def with_share(count: int, of: int) -> str:
    """A count, thousands separated, and its share."""
    return f"{count:,} ({count / max(of, 1):.1%})"


def count_lines(counts: Mapping[str, int], *, share_of: int | None = None) -> list[tuple[str, str]]:
    """Lines of a table for what is not zero: thousands separated, with the share of `share_of` where that is given."""
    shown = {name: count for name, count in counts.items() if count}
    return [(name, f"{n:,}" if share_of is None else with_share(n, share_of)) for name, n in shown.items()]


@dataclass(frozen=True)
class DataSettings:
    """The part of a recipe that decides its documents; each task adds its own keys."""

    MIN_OWN_TOKENS: ClassVar[int]  # that a document needs beside its special tokens

    max_seq_length: int  # tokens of a document at most, special tokens included

    @classmethod
    def of(cls, recipe: Any) -> Self:
        """The settings of a recipe: both of a run and of whatever is later predicted with its model."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        least = special_tokens + self.MIN_OWN_TOKENS
        if self.max_seq_length < least:
            says = f"max_seq_length is {self.max_seq_length}: a document needs at least {least} tokens"
            raise UserError(says, reason=VALUES)
        for key, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, key) not in get_args(kind):
                raise UserError(f"{key} is {getattr(self, key)!r}; it may be {', '.join(get_args(kind))}")


def _no_texts() -> Iterator[str]:
    raise AssertionError("only labelled texts are read a second time")


@dataclass(frozen=True)
class PreparedData:
    """Documents, the rows that they were put in, the counts to print, and a digest of all that decided them.

    `texts()` reads the texts of labelled documents once more, as they stand in the source, in the documents' order.
    """

    documents: Documents
    rows: Rows
    table: CountsTable
    fingerprint: str
    texts: Callable[[], Iterator[str]] = _no_texts

    @property
    def num_labels(self) -> int | None:
        """Outputs of the model: classes or labels, or 1 of a regression; None for conversations."""
        return len(self.table.counts["classes"] or (1,)) if self.documents.has_labels else None

    @property
    def task_type(self) -> str:
        """What kind of targets the documents have."""
        return self.table.counts.get("task_type", SINGLE_LABEL)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, where the source of the labels gives any."""
        return self.table.counts.get("class_names")


@dataclass(frozen=True)
class RunData:
    """The prepared training documents of a run, and those of its evaluation where the recipe names any."""

    train: PreparedData
    evaluation: PreparedData | None
    found: Mapping[str, Any] = field(default_factory=dict[str, Any])  # values of the recipe that the data decided
    to_choose_on: PreparedData | None = None  # texts that label thresholds are chosen on, which nothing else reads

    def shown(self, show: bool) -> Self:
        """These data; where `show` asks for it, what preparation counted is printed, a table a data set."""
        for prepared in filter(None, (self.train, self.evaluation) if show else ()):
            print(prepared.table, flush=True)
        return self
