"""Texts that a recipe names, or a program asks about, classified with the model that a run has saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.labels import labels_of
from isotune.data.classification.predictions import in_words, predicted
from isotune.data.contents import clean
from isotune.data.documents import Documents
from isotune.data.sources.source import surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.classification.evaluate import classify, outputs_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier, load_run_classifier
from isotune.io.errors import UserError

SHOWN_CHARACTERS = 60  # of a sentence


def show_sentences(run: Path, texts: Sequence[str], device: torch.device) -> None:
    """Classify texts with the model that a run saved, with the cleaning, truncation and class names of its recipe.

    A line of the printed table has the class of a text where the recipe's labels come from the text (`label_source:
    rules` or `random`), the predicted one, a mark where they differ, and the start of the text.
    """
    classifier = load_run_classifier(run, device, torch.float32)
    settings, task_type = classifier.settings, classifier.task_type
    truth = None if settings.label_source == "column" else labels_of(texts, settings)
    outputs = _outputs(classifier, texts)
    names = classifier.label_names or tuple(map(str, range(classifier.num_labels)))
    actual = [None if truth is None else names[truth[row]] for row in range(len(texts))]
    guesses = [in_words(task_type, guess, names) for guess in predicted(task_type, outputs)]
    width = max(len(name or "") for name in [*actual, *guesses, "predicted"])
    sure = "" if task_type == REGRESSION else "probability  "
    print(f"  {'true':<{width}}  {'predicted':<{width}}  {sure}text")
    for text, own, guess, row in zip(texts, actual, guesses, outputs, strict=True):
        line = " ".join(text.split())
        shown = line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}..."
        mark = " " if own in (None, guess) else "x"
        certainty = f"{_certainty(task_type, row):<11.3f}  " if sure else ""
        print(f"{mark} {own or '?':<{width}}  {guess:<{width}}  {certainty}{shown}")


def predict_texts(classifier: Classifier, texts: Sequence[str]) -> list[Any]:
    """The class of each text and its probability; the labels, each with its own; or the number of a regression.

    UserError for a model that reads pairs of texts.
    """
    outputs, task_type = _outputs(classifier, texts), classifier.task_type
    names = classifier.label_names or tuple(range(classifier.num_labels))
    found = predicted(task_type, outputs)
    if task_type == REGRESSION:
        return found.tolist()
    if task_type == MULTI_LABEL:
        return [
            [(names[label], float(row[label])) for label in np.flatnonzero(own)]
            for own, row in zip(found, outputs, strict=True)
        ]
    return [(names[label], float(row[label])) for label, row in zip(found.tolist(), outputs, strict=True)]


def _outputs(classifier: Classifier, texts: Sequence[str]) -> np.ndarray:
    """What the model predicts for texts, which are cleaned and cut as in its training."""
    if classifier.settings.dataset_text_pair_field is not None:
        raise UserError(f"{classifier.name} reads two texts, and a sentence is one: evaluate a file with both columns")
    documents = encode_texts(classifier, TextEncoder(classifier.tokenizer), texts)
    return outputs_of(classifier.task_type, classify(classifier, documents, Ranks(0, 1, classifier.device)))


def encode_texts(
    classifier: Classifier, encoder: TextEncoder, texts: Sequence[str], others: Sequence[str] | None = None
) -> Documents:
    """Texts, or with `others` pairs, cleaned and cut as in the model's training; UserError for one that is not UTF-8.

    `encoder` is of the classifier's tokenizer.
    """
    settings = classifier.settings
    for text in (*texts, *(others or ())):
        if surrogate_fault(text):
            raise UserError(f"sentences: {text!r} is not UTF-8")
    one, two = (
        [clean(text) for text in column] if settings.clean_text else list(column) for column in (texts, others or ())
    )
    if others is None:
        return encoder.encode(one, settings.max_seq_length, settings.overlong)
    return encoder.encode_pairs(one, two, settings.max_seq_length, settings.overlong)


def _certainty(task_type: str, probabilities: np.ndarray) -> float:
    """The probability of the class; of several labels that of the least certain decision."""
    return float(
        np.maximum(probabilities, 1 - probabilities).min() if task_type == MULTI_LABEL else probabilities.max()
    )
