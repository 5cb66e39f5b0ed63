"""Examples of predictions beside the labels, the most confident errors first."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.io.files import replace_file

FILE = "examples.jsonl"
SHOWN, WRITTEN, LINE = 5, 100, 160


@dataclass(frozen=True)
class Example:
    """A row: its id, the names of its label and of the predicted class, the latter's probability, and its text."""

    id: Any
    actual: str
    predicted: str
    probability: float
    text: str

    @property
    def correct(self) -> bool:
        """Whether the prediction is the label."""
        return self.actual == self.predicted


def errors_first(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Numbers of rows, int64 [rows]: errors, the most confident first, then the others, the least confident first."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    return np.lexsort((np.where(correct, confidence, -confidence), correct))


def examples_of(
    rows: np.ndarray, ids: list[Any], labels: np.ndarray, probabilities: np.ndarray, texts: list[str], names: list[str]
) -> list[Example]:
    """The examples of these rows, int [rows]."""
    predicted = probabilities.argmax(axis=1)
    return [
        Example(
            ids[row], names[labels[row]], names[predicted[row]], float(probabilities[row, predicted[row]]), texts[row]
        )
        for row in rows.tolist()
    ]


def write_examples(examples: list[Example], folder: Path) -> Path:
    """Write the first WRITTEN examples, one JSON line each."""
    file = folder / FILE
    replace_file(file, "".join(json.dumps(asdict(example)) + "\n" for example in examples[:WRITTEN]))
    return file


def print_examples(examples: list[Example]) -> None:
    """Print the first SHOWN examples, each on two lines."""
    for example in examples[:SHOWN]:
        text = " ".join(example.text.split())
        classes = f"actual {example.actual}, predicted {example.predicted}"
        print(f"  {'=' if example.correct else 'x'} id {example.id}: {classes} ", end="")
        print(f"({example.probability:.1%})\n      {text[: LINE - 1] + '…' if len(text) > LINE else text}")
