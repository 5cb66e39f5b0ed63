"""The rows of an evaluation that show most: errors first, each with what it is, what was predicted, and its text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.predictions import in_words, predicted
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.io.reading import Unreadable, checked, parse_json, read_text
from isotune.io.run_files import EXAMPLE_SCHEMA

EXAMPLES = "examples.jsonl"
SHOWN, WRITTEN, LINE = 5, 100, 160
FIRST = {MULTI_LABEL: "the most wrong labels first:", REGRESSION: "the largest errors first:"}


def errors_first(
    task_type: str, labels: np.ndarray, outputs: np.ndarray, thresholds: Thresholds = THRESHOLD
) -> np.ndarray:
    """Numbers of rows, int64: errors, the most confident first, then the others, the least confident first.

    Rows with several labels are in the order of how many are wrong and then how far their probabilities are off, those
    of a regression in that of their absolute errors.
    """
    if task_type == REGRESSION:
        return np.argsort(-np.abs(outputs - labels), kind="stable")
    if task_type == MULTI_LABEL:
        wrong = (predicted(task_type, outputs, thresholds) != labels.astype(bool)).sum(axis=1)
        return np.lexsort((-np.abs(outputs - labels).sum(axis=1), -wrong))
    confidence = outputs.max(axis=1)
    correct = outputs.argmax(axis=1) == labels
    return np.lexsort((np.where(correct, confidence, -confidence), correct))


def examples_of(
    task_type: str,
    rows: Sequence[int],
    ids: Sequence[Any],
    labels: np.ndarray,
    outputs: np.ndarray,
    names: Sequence[str],
    texts: Sequence[str],
    thresholds: Thresholds,
) -> list[dict[str, Any]]:
    """Each of `rows`: its id, in words what it is and what was predicted, its class's probability, and its text."""
    found = predicted(task_type, outputs, thresholds)
    examples: list[dict[str, Any]] = []
    for row in rows:
        actual, guess = in_words(task_type, labels[row], names), in_words(task_type, found[row], names)
        example: dict[str, Any] = {"id": ids[row], "actual": actual, "predicted": guess}
        if task_type not in (REGRESSION, MULTI_LABEL):
            example["probability"] = float(outputs[row, found[row]])
        examples.append(example | {"text": texts[row]})
    return examples


def read_examples(folder: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The examples that the evaluation in a folder kept; none where it kept no such file, or it cannot be read.

    `notes` get the sentence about one that cannot.
    """
    try:
        text = read_text(folder / EXAMPLES, root=folder)
        return [dict(checked(parse_json(line), EXAMPLE_SCHEMA)) for line in text.splitlines()]
    except FileNotFoundError:
        return []
    except Unreadable as reason:
        if notes is not None:
            notes.append(f"{folder / EXAMPLES} is left out: {reason}.")
        return []


def kept_errors(folder: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The errors among them."""
    return [example for example in read_examples(folder, notes) if example["actual"] != example["predicted"]]


def print_examples(task_type: str, examples: Sequence[dict[str, Any]]) -> None:
    """The first SHOWN examples, each on two lines."""
    print(FIRST.get(task_type, "most confident errors first:"))
    for example in examples[:SHOWN]:
        text = " ".join(example["text"].split())
        mark = "=" if example["actual"] == example["predicted"] else "x"
        sure = f"({example['probability']:.1%})" if "probability" in example else ""
        print(
            f"  {mark} id {example['id']}: actual {example['actual']}, predicted {example['predicted']} {sure}".rstrip()
        )
        print(f"      {text[: LINE - 1] + '…' if len(text) > LINE else text}")
