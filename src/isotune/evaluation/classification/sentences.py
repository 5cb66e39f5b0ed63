"""Texts that a recipe names, or that a program or `isotune predict` asks about, classified as training read them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.labels import labels_of
from isotune.data.classification.pairs import joined
from isotune.data.classification.predictions import in_words, predicted
from isotune.data.classification.reading import encode_texts
from isotune.data.classification.thresholds import Thresholds
from isotune.data.contents import clean
from isotune.data.documents import Documents
from isotune.data.sources.source import surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.classification.evaluate import classify, outputs_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier
from isotune.evaluation.samples import Sample
from isotune.io.errors import UserError

SHOWN_CHARACTERS = 60  # of a sentence
Asked = str | tuple[str, str]  # a text, or the two of a pair


class TextReader:
    """Makes the documents that a classifier reads of texts: cleaned, cut and unpadded as in its training."""

    def __init__(self, classifier: Classifier) -> None:
        self.settings = classifier.settings
        self.encoder = TextEncoder(classifier.tokenizer)

    def documents(self, of_each: Sequence[Sequence[str]]) -> Documents:
        """One column of texts, or the two of pairs, as documents in their order, of no class."""
        if self.settings.clean_text:
            of_each = [[clean(text) for text in column] for column in of_each]
        return encode_texts(self.encoder, self.settings, of_each)


def show_sentences(classifier: Classifier, asked: Sequence[Asked]) -> list[Sample]:
    """Classify texts, or pairs of texts, print them, and return what was said of each.

    A line of the printed table has the class of a text where the recipe's labels come from the text (`label_source:
    rules` or `random`), the predicted one, a mark where they differ, and the start of the text.
    """
    settings = classifier.settings
    of_each = _columns(classifier, asked)
    texts = joined(*of_each)
    truth = None if settings.label_source == "column" else labels_of(texts, settings)
    names = classifier.label_names or tuple(map(str, range(classifier.num_labels)))
    actual = [None if truth is None else names[truth[row]] for row in range(len(texts))]
    outputs = _outputs(classifier, of_each)
    return print_predictions(classifier.task_type, texts, outputs, names, classifier.thresholds, actual)


def print_predictions(
    task_type: str,
    texts: Sequence[str],
    outputs: np.ndarray,
    names: Sequence[str],
    thresholds: Thresholds,
    actual: Sequence[str | None],
) -> list[Sample]:
    """A line for each text with what is predicted of it; `actual` is its class, None where that is not known."""
    guesses = [in_words(task_type, guess, names) for guess in predicted(task_type, outputs, thresholds)]
    width = max(len(name or "") for name in [*actual, *guesses, "predicted"])
    sure = "" if task_type == REGRESSION else "probability  "
    print(f"  {'true':<{width}}  {'predicted':<{width}}  {sure}text")
    samples: list[Sample] = []
    for text, own, guess, row in zip(texts, actual, guesses, outputs, strict=True):
        line = " ".join(text.split())
        shown = line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}..."
        mark = " " if own in (None, guess) else "x"
        certainty = f"{_certainty(task_type, row):<11.3f}  " if sure else ""
        print(f"{mark} {own or '?':<{width}}  {guess:<{width}}  {certainty}{shown}")
        samples.append({"input": text, "output": guess})
        samples[-1] |= {"probability": certainty.strip()} if sure else {}
        samples[-1] |= {"true": own} if own is not None else {}
    return samples


def predict_texts(classifier: Classifier, asked: Sequence[Asked]) -> list[Any]:
    """The class of each text or pair and its probability; the labels, each with its own; or the number of a regression.

    UserError for single texts where the model reads pairs, or the other way round.
    """
    outputs, task_type = _outputs(classifier, _columns(classifier, asked)), classifier.task_type
    names = classifier.label_names or tuple(range(classifier.num_labels))
    found = predicted(task_type, outputs, classifier.thresholds)
    if task_type == REGRESSION:
        return found.tolist()
    if task_type == MULTI_LABEL:
        return [
            [(names[label], float(row[label])) for label in np.flatnonzero(own)]
            for own, row in zip(found, outputs, strict=True)
        ]
    return [(names[label], float(row[label])) for label, row in zip(found.tolist(), outputs, strict=True)]


def _columns(classifier: Classifier, asked: Sequence[Asked]) -> list[list[str]]:
    """The texts as columns, as many as the model reads; UserError where they are not of its kind, or no UTF-8."""
    is_pair = classifier.settings.dataset_text_pair_field is not None
    for one in asked:
        if isinstance(one, str) == is_pair:
            how = "two texts, and a sentence is one" if is_pair else "one text, and a pair is two"
            raise UserError(f"{classifier.name} reads {how}")
    rows = [(one,) if isinstance(one, str) else one for one in asked]
    of_each = [[row[place] for row in rows] for place in range(1 + is_pair)]
    check_utf8(of_each)
    return of_each


def check_utf8(of_each: Sequence[Sequence[str]]) -> None:
    """UserError for the first text of the columns that is not UTF-8."""
    for text in (text for column in of_each for text in column):
        if surrogate_fault(text):
            raise UserError(f"sentences: {text!r} is not UTF-8")


def _outputs(classifier: Classifier, of_each: Sequence[Sequence[str]]) -> np.ndarray:
    documents = TextReader(classifier).documents(of_each)
    return outputs_of(classifier.task_type, classify(classifier, documents, Ranks(0, 1, classifier.device)))


def _certainty(task_type: str, probabilities: np.ndarray) -> float:
    """The probability of the class; of several labels that of the least certain decision."""
    return float(
        np.maximum(probabilities, 1 - probabilities).min() if task_type == MULTI_LABEL else probabilities.max()
    )
