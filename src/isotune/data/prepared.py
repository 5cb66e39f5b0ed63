"""What both tasks share of preparing data: the settings that go in, and the prepared data that come out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from isotune.data.counts_table import CountsTable
from isotune.data.documents import Documents, Rows
from isotune.io.errors import UserError


@dataclass(frozen=True)
class DataSettings:
    """The part of a recipe that decides its documents; each task adds its own keys.

    Attributes:
        max_seq_length: tokens of a document at most, special tokens included.
        overlong: what happens to a longer document.
        dataset_text_field: the column that holds the text.
        seed: of whatever chance decides.
        MIN_OWN_TOKENS: tokens that a document needs beside its special tokens.
        CHOICES: the values that a key may have.
    """

    MIN_OWN_TOKENS: ClassVar[int]
    CHOICES: ClassVar[dict[str, tuple[str, ...]]]

    max_seq_length: int
    overlong: str
    dataset_text_field: str
    seed: int

    @classmethod
    def of(cls, recipe: Any) -> Self:
        """The settings of a recipe: both of a run and of whatever is later predicted with its model."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        least = special_tokens + self.MIN_OWN_TOKENS
        if self.max_seq_length < least:
            raise UserError(f"max_seq_length is {self.max_seq_length}: a document needs at least {least} tokens")
        for key, choices in self.CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{key} is {getattr(self, key)!r}; it may be {', '.join(choices)}")


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
        """Classes, from 0 to the largest; None for conversations."""
        return len(self.table.counts["classes"]) if self.documents.has_labels else None

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, where the source of the labels gives any."""
        return self.table.counts.get("class_names")
