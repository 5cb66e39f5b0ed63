"""From which probability a text has a label: given by a recipe or task, or chosen on texts that nothing else reads.

RUN/model/label_thresholds.json keeps them beside the weights, so that whoever evaluates or predicts uses the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isotune.data.class_index import NameIndex, listed
from isotune.io.errors import UserError
from isotune.io.run_files import or_refuse, read_label_thresholds

THRESHOLD = 0.5  # where nobody says otherwise
Thresholds = float | Sequence[float] | np.ndarray  # of all labels, or of each

THRESHOLDS_FILE = "label_thresholds.json"
CHOSEN, CHOSEN_ON = "chosen", "label thresholds"  # what `label_thresholds` says for it; the purpose of the random split
CHOSEN_SHARE = 0.1  # of the training texts


def choose_thresholds(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The threshold of each label with the best F1: float64 [labels], of 0 or 1 and probabilities [rows, labels].

    Between two probabilities it is halfway; of several as good ones the nearest to THRESHOLD. A label that no row has
    keeps THRESHOLD.
    """
    return np.array([_best(labels[:, k].astype(bool), probabilities[:, k]) for k in range(labels.shape[1])])


def _best(truth: np.ndarray, probabilities: np.ndarray) -> float:
    if not truth.any():
        return THRESHOLD
    order = np.argsort(-probabilities, kind="stable")
    sure, hits = probabilities[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(truth) + 1) + truth.sum())  # where the first 1, 2, ... rows get the label
    last = np.append(sure[1:] < sure[:-1], True)  # rows of one probability get it together
    below = np.append(sure[1:], 0.0)
    good = np.flatnonzero(last & (f1 == f1[last].max()))
    # anything from `below` (not included) to `sure` gives the same labels
    nearest = np.where((below[good] < THRESHOLD) & (sure[good] >= THRESHOLD), THRESHOLD, (sure[good] + below[good]) / 2)
    return float(nearest[np.abs(nearest - THRESHOLD).argmin()])


def thresholds_of(given: Sequence[float] | None, labels: int, key: str = "label_thresholds") -> np.ndarray | float:
    """Those of a recipe or task, one for all labels or one for each; UserError where their number is another."""
    if given is None:
        return THRESHOLD
    if len(given) not in (1, labels):
        raise UserError(f"{key} has {len(given)} numbers, and there are {labels} labels: give one, or one for each")
    return np.full(labels, given[0]) if len(given) == 1 else np.array(given, np.float64)


def write_thresholds(model: Path, thresholds: Thresholds, names: Sequence[str], chosen_on: int | None) -> None:
    """Keep the threshold of each label in a model's folder; `chosen_on` is the number of texts, if they were chosen."""
    values = dict(zip(names, np.broadcast_to(np.asarray(thresholds, np.float64), len(names)).tolist(), strict=True))
    found = {"label_thresholds": values, "chosen_on_texts": chosen_on}
    (model / THRESHOLDS_FILE).write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def read_thresholds(model: Path, names: Sequence[str]) -> np.ndarray | float:
    """Those in a model's folder, in the order of `names`; THRESHOLD without any. UserError where labels are others."""
    path = model / THRESHOLDS_FILE
    if not path.is_file():
        return THRESHOLD
    values = or_refuse(read_label_thresholds, path, f"{path} does not hold label_thresholds")
    order = NameIndex(list(values)).order_of(names)
    if order is None:
        raise UserError(f"{path} is of the labels {listed(values)}, and the model has {listed(names)}")
    return np.array(list(values.values()), np.float64)[order]
