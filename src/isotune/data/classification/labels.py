"""What a recipe says about its labelled data, and the classes that follow from a text itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import numpy as np

from isotune.config.recipes import AUTO, LabelSource, OverlongText
from isotune.config.task_types import TaskType
from isotune.data.contents import clean, contents_of, random_labels
from isotune.data.documents import DataSettings
from isotune.io.errors import UserError

# Classes that follow from a text itself: their names, and the function that gives a clean text one of them.
LabelRules = tuple[tuple[str, ...], Callable[[str], int]]
LABEL_RULES: list[LabelRules] = []  # those of `label_source: rules`, which a project appends when it is imported


def _rules() -> LabelRules:
    import_module("isotune.projects")
    return LABEL_RULES[0]


@dataclass(frozen=True)
class ClassificationSettings(DataSettings):
    """What a recipe says about its labelled data."""

    MIN_OWN_TOKENS: ClassVar[int] = 1

    max_seq_length: int = 512
    overlong: OverlongText = "head"  # which end is kept, or both
    dataset_text_field: str = "text"
    dataset_text_pair_field: str | None = None  # the second text, where the model reads two
    task_type: TaskType = AUTO  # what the labels are; by the cells of their column where nobody says it
    seed: int = 0  # of the random labels
    dataset_label_field: str = "label"
    dataset_id_field: str = AUTO  # `id` where it names each row once; NO_IDS: row numbers
    clean_text: bool = False  # undo HTML and escapes (isotune.data.contents)
    label_source: LabelSource = "column"  # or the rules that a project has; or random, by the seed and the content
    num_labels: int | None = None  # as many as there are
    label_names: tuple[str, ...] | None = None  # of the classes in their order; else those of the data

    @property
    def known_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where they are known before the data are read."""
        if self.label_source == "rules":
            return _rules()[0]
        return ("heads", "tails") if self.label_source == "random" else self.label_names

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        super().check(special_tokens)
        if self.known_names and self.num_labels not in (None, len(self.known_names)):
            says = "label_names" if self.label_source == "column" else f"label_source: {self.label_source}"
            raise UserError(
                f"num_labels is {self.num_labels}, and {says} has {len(self.known_names)} classes "
                f"({', '.join(self.known_names)})"
            )


def labels_of(texts: Sequence[str], settings: ClassificationSettings) -> np.ndarray:
    """The classes that the rules, or chance, give to texts: int32 [texts]."""
    if settings.label_source == "random":
        return random_labels(settings.seed, contents_of(texts))
    assert settings.label_source == "rules", "the classes of other sources stand in a column"
    _, classify = _rules()
    return np.array([classify(clean(text)) for text in texts], np.int32)
