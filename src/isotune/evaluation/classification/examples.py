"""The rows worth reading: what was true beside what was predicted, the most confident errors first."""

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
    """A row: its id, the names of the true and of the predicted class, the latter's probability, and its text."""

    id: Any
    actual: str
    predicted: str
    probability: float
    text: str

    @property
    def right(self) -> bool:
        """Whether the prediction is true."""
        return self.actual == self.predicted


def worth_reading(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Numbers of rows, int64 [rows]: errors, the most confident first, then right ones, the least confident first."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    return np.lexsort((np.where(right, confidence, -confidence), right))


def examples_of(
    rows: np.ndarray, ids: list[Any], labels: np.ndarray, probabilities: np.ndarray, texts: list[str], names: list[str]
) -> list[Example]:
    """The rows of these numbers."""
    chosen = probabilities.argmax(axis=1)
    return [
        Example(ids[r], names[labels[r]], names[chosen[r]], float(probabilities[r, chosen[r]]), texts[r])
        for r in rows.tolist()
    ]


def write_examples(examples: list[Example], folder: Path) -> Path:
    """A JSON line an example, WRITTEN of them."""
    file = folder / FILE
    replace_file(file, "".join(json.dumps(asdict(one)) + "\n" for one in examples[:WRITTEN]))
    return file


def print_examples(examples: list[Example]) -> None:
    """The first SHOWN, each on two lines."""
    for one in examples[:SHOWN]:
        text = " ".join(one.text.split())
        print(f"  {'=' if one.right else 'x'} id {one.id}: actual {one.actual}, predicted {one.predicted} ", end="")
        print(f"({one.probability:.1%})\n      {text[: LINE - 1] + '…' if len(text) > LINE else text}")
