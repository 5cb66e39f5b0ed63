"""Predictions of a finished classifier for a few texts, beside their labels where those are known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from isotune.data.classification.labels import labels_of
from isotune.data.contents import clean
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.classification.models import Classifier, load_run_classifier
from isotune.evaluation.classification.prediction import classify, probabilities_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.io.errors import UserError

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Classified:
    """One text: its class (None where it is unknown), the predicted one, and the latter's probability."""

    text: str
    truth: str | None
    prediction: str
    probability: float


def classify_texts(classifier: Classifier, texts: Sequence[str]) -> list[Classified]:
    """Classify texts with the cleaning, truncation and class names of the model's recipe.

    The class is known where the recipe's labels come from the text (`label_source: rules` or `random`).
    """
    settings = classifier.settings
    for text in texts:
        _check_characters(text)
    cleaned = [clean(text) for text in texts] if settings.clean_text else list(texts)
    truth = None if settings.label_source == "column" else labels_of(texts, settings)
    documents = TextEncoder(classifier.tokenizer).encode(cleaned, settings.max_seq_length, settings.overlong, truth)
    device = next(classifier.model.parameters()).device
    probabilities = probabilities_of(classify(classifier, documents, Ranks(0, 1, device)))
    names = classifier.label_names or tuple(map(str, range(probabilities.shape[1])))
    return [
        Classified(
            text=text,
            truth=None if truth is None else names[truth[row]],
            prediction=names[int(probabilities[row].argmax())],
            probability=float(probabilities[row].max()),
        )
        for row, text in enumerate(texts)
    ]


def show_sentences(run: Path, texts: Sequence[str], device: torch.device) -> None:
    """Classify texts with the model that a run saved, and print the classes beside the predictions."""
    print(table(classify_texts(load_run_classifier(run, device, torch.float32), texts)))


def table(results: Sequence[Classified]) -> str:
    """One line for each text: its class, the predicted one, a mark where they differ, and the start of the text."""
    width = max(len(name) for result in results for name in (result.prediction, result.truth or "", "predicted"))
    lines = [f"  {'true':<{width}}  {'predicted':<{width}}  probability  text"]
    for result in results:
        mark = " " if result.truth in (None, result.prediction) else "x"
        text = " ".join(result.text.split())
        shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
        classes = f"{result.truth or '?':<{width}}  {result.prediction:<{width}}"
        lines.append(f"{mark} {classes}  {result.probability:<11.3f}  {shown}")
    return "\n".join(lines)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"sentences: {text!r} is not UTF-8") from None
