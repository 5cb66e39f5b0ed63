"""What a recipe says about its labelled data, and the classes that come from a text itself, not from a column."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

import numpy as np

from isotune.config import ClassificationRecipe
from isotune.config.kinds import load_projects
from isotune.data.classification.text_encoding import OverlongText
from isotune.data.clean_text import clean, content_digest, normalised
from isotune.data.hash_split import coin
from isotune.io.errors import UserError

LabelSource = Literal["column", "rules", "random"]


@dataclass(frozen=True)
class LabelRules:
    """Classes that follow from a text itself: their names, and the function that gives a clean text one of them."""

    names: tuple[str, ...]
    classify: Callable[[str], int]


_REGISTERED: list[LabelRules] = []


def register_label_rules(rules: LabelRules) -> None:
    """Make these the classes of `label_source: rules`."""
    _REGISTERED.append(rules)


def _rules() -> LabelRules:
    load_projects()
    return _REGISTERED[0]


@dataclass(frozen=True)
class LabelSettings:
    """What a recipe says about its labelled data.

    Attributes:
        max_seq_length: tokens of a document at most, special tokens included.
        overlong: which end of a longer text is kept, or both.
        dataset_text_field, dataset_label_field, dataset_id_field: the columns; no id field: `id` where there is one.
        clean_text: undo HTML and escapes (isotune.data.clean_text).
        label_source: the column; the rules that a project registered; or a coin of the seed and the content.
        seed: of that coin.
        num_labels: classes; None takes as many as there are.
    """

    max_seq_length: int = 512
    overlong: OverlongText = "head"
    dataset_text_field: str = "text"
    dataset_label_field: str = "label"
    dataset_id_field: str | None = None
    clean_text: bool = False
    label_source: LabelSource = "column"
    seed: int = 0
    num_labels: int | None = None

    @classmethod
    def of(cls, recipe: ClassificationRecipe) -> Self:
        """The settings of a recipe: both of a run and of whatever is later predicted with its model."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the source of the labels gives any."""
        if self.label_source == "rules":
            return _rules().names
        return ("heads", "tails") if self.label_source == "random" else None

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        if self.max_seq_length < special_tokens + 1:
            raise UserError(
                f"max_seq_length is {self.max_seq_length}: a document needs at least {special_tokens + 1} tokens"
            )
        for key, choices in (("overlong", get_args(OverlongText)), ("label_source", get_args(LabelSource))):
            if getattr(self, key) not in choices:
                raise UserError(f"{key} is {getattr(self, key)!r}; it may be {', '.join(choices)}")
        if self.label_names and self.num_labels not in (None, len(self.label_names)):
            raise UserError(
                f"num_labels is {self.num_labels}, and label_source: {self.label_source} has {len(self.label_names)} "
                f"classes ({', '.join(self.label_names)})"
            )


def contents_of(texts: Sequence[str]) -> np.ndarray:
    """What each text says, as uint64 [texts]: equal for two spellings of one text."""
    return np.array([content_digest(normalised(text)) for text in texts], np.uint64)


def labels_of(texts: Sequence[str], settings: LabelSettings) -> np.ndarray:
    """The classes that the rules or the coin of the settings give to texts: int32 [texts]."""
    if settings.label_source == "random":
        return coin(settings.seed, contents_of(texts))
    assert settings.label_source == "rules", "the classes of other sources stand in a column"
    rules = _rules()
    return np.array([rules.classify(clean(text)) for text in texts], np.int32)
