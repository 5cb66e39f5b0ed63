"""A finished classifier tried on a few texts: what is true, where that is known, against what it predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from isotune.data.classification.labels import labels_of
from isotune.data.classification.text_encoding import TextEncoder
from isotune.data.clean_text import clean
from isotune.evaluation.classification.models import Classifier, load_run_classifier
from isotune.evaluation.classification.prediction import classify, probabilities_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.io.errors import UserError

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Classified:
    """One text: its true class (None where nobody knows), the predicted one, and the probability of that."""

    text: str
    truth: str | None
    prediction: str
    probability: float


def classify_texts(classifier: Classifier, texts: Sequence[str]) -> list[Classified]:
    """Classify texts as the model's run read its own: cleaned, cut and named as its recipe says.

    The truth is known where the recipe's labels come from the text (`label_source: rules` or `random`).
    """
    settings = classifier.settings
    for text in texts:
        _check_characters(text)
    read = [clean(text) for text in texts] if settings.clean_text else list(texts)
    truth = None if settings.label_source == "column" else labels_of(texts, settings)
    documents = TextEncoder(classifier.tokenizer).encode(read, settings.max_seq_length, settings.overlong, truth)
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
    """Classify texts with the model that a run saved, and print true against predicted."""
    found = classify_texts(load_run_classifier(run, device, torch.float32), texts)
    print(table(found))


def table(found: Sequence[Classified]) -> str:
    """A line a text: its true and its predicted class, a mark where they differ, and the text's beginning."""
    width = max(len(name) for one in found for name in (one.prediction, one.truth or "", "predicted"))
    lines = [f"  {'true':<{width}}  {'predicted':<{width}}  probability  text"]
    for one in found:
        mark = " " if one.truth in (None, one.prediction) else "x"
        text = " ".join(one.text.split())
        shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
        lines.append(
            f"{mark} {one.truth or '?':<{width}}  {one.prediction:<{width}}  {one.probability:<11.3f}  {shown}"
        )
    return "\n".join(lines)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"sentences: {text!r} is not UTF-8") from None
