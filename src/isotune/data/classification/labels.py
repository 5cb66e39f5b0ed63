"""What a recipe says about its labelled data, and labels computed from a text instead of read from a column."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from isotune.config.kinds import load_projects
from isotune.data.classification.text_encoding import OverlongText
from isotune.data.clean_text import clean, content_digest, normalised
from isotune.data.hash_split import random_labels
from isotune.data.prepared import DataSettings
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
class ClassificationSettings(DataSettings):
    """What a recipe says about its labelled data.

    Attributes:
        overlong: which end of a longer text is kept, or both.
        seed: of the random labels.
        dataset_label_field, dataset_id_field: the columns; no id field: `id` where there is one.
        clean_text: undo HTML and escapes (isotune.data.clean_text).
        label_source: the column; the rules that a project registered; or random, by the seed and the content.
        num_labels: classes; None takes as many as there are.
    """

    MIN_OWN_TOKENS: ClassVar[int] = 1
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "overlong": get_args(OverlongText),
        "label_source": get_args(LabelSource),
    }

    max_seq_length: int = 512
    overlong: OverlongText = "head"
    dataset_text_field: str = "text"
    seed: int = 0
    dataset_label_field: str = "label"
    dataset_id_field: str | None = None
    clean_text: bool = False
    label_source: LabelSource = "column"
    num_labels: int | None = None

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the source of the labels gives any."""
        if self.label_source == "rules":
            return _rules().names
        return ("heads", "tails") if self.label_source == "random" else None

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        super().check(special_tokens)
        if self.label_names and self.num_labels not in (None, len(self.label_names)):
            raise UserError(
                f"num_labels is {self.num_labels}, and label_source: {self.label_source} has {len(self.label_names)} "
                f"classes ({', '.join(self.label_names)})"
            )


def contents_of(texts: Sequence[str]) -> np.ndarray:
    """What each text says, as uint64 [texts]: equal for two spellings of one text."""
    return np.array([content_digest(normalised(text)) for text in texts], np.uint64)


def labels_of(texts: Sequence[str], settings: ClassificationSettings) -> np.ndarray:
    """The classes that the rules, or chance, give to texts: int32 [texts]."""
    if settings.label_source == "random":
        return random_labels(settings.seed, contents_of(texts))
    assert settings.label_source == "rules", "the classes of other sources stand in a column"
    rules = _rules()
    return np.array([rules.classify(clean(text)) for text in texts], np.int32)
