"""Predicts with an ensemble: OUT/ensemble.json names the runs of its members, their weights and the classes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config.task_types import SINGLE_LABEL
from isotune.data.class_index import NameIndex, listed
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.data.documents import Documents
from isotune.data.sources.source import Row, Source
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier
from isotune.evaluation.prediction.predictors import (
    LeftOut,
    Line,
    Part,
    TextPredictor,
    flat_prediction,
    lines_of_outputs,
)
from isotune.evaluation.statistics.blending import blend, weighted_sum
from isotune.io.errors import UserError
from isotune.io.reading import read_json_object
from isotune.io.run_files import ENSEMBLE, or_refuse


@dataclass(frozen=True)
class SavedEnsemble:
    """The content of OUT/ensemble.json."""

    folder: Path
    runs: list[str]  # of the members
    weights: np.ndarray  # float64 [members], with sum 1
    task_type: str
    label_names: list[str] | None
    thresholds: Thresholds = THRESHOLD


def read_ensemble(folder: Path) -> SavedEnsemble:
    """The ensemble in a folder; UserError where its file is broken."""
    file = folder / ENSEMBLE
    content = or_refuse(read_json_object, file, f"{file}: cannot be read")
    try:
        members: list[dict[str, Any]] = content["members"]
        runs, weights = [str(one["run"]) for one in members], np.array([float(one["weight"]) for one in members])
        names, thresholds = content["label_names"], content["label_thresholds"]
        return SavedEnsemble(folder, runs, weights, str(content["task_type"]), names, thresholds or THRESHOLD)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: it holds no ensemble of runs ({error})") from None


class EnsemblePredictor:
    """The weighted mean of what several classifiers say of a row, each reading it in its own way."""

    def __init__(self, saved: SavedEnsemble, members: Sequence[TextPredictor]) -> None:
        self.saved, self.members = saved, members
        self.orders = [_order(saved, member.classifier) for member in members]

    @property
    def part_rows(self) -> int:
        """As few as the member with the fewest."""
        return min(member.part_rows for member in self.members)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the members' predictions, and how they are blended."""
        return {
            "task_type": self.saved.task_type,
            "label_names": self.saved.label_names,
            "ensemble": [
                {"run": run, "weight": weight, **member.facts}
                for run, weight, member in zip(self.saved.runs, self.saved.weights.tolist(), self.members, strict=True)
            ],
        }

    def take(self, row: Row, source: Source, number: int) -> list[tuple[str, ...]] | LeftOut:
        """What each member needs of a row; left out where one leaves it out."""
        taken: list[tuple[str, ...]] = []
        for member in self.members:
            own = member.take(row, source, number)
            if isinstance(own, LeftOut):
                return own
            taken.append(own)
        return taken

    def prepare(self, rows: Sequence[tuple[int, list[tuple[str, ...]]]]) -> list[Documents]:
        """The documents of each member."""
        return [
            member.prepare([(number, taken[place]) for number, taken in rows])
            for place, member in enumerate(self.members)
        ]

    def predict(self, prepared: Sequence[Documents], ranks: Ranks) -> Part:
        """The blended lines; a row counts as cut for each member that cuts it."""
        lines = lines_of_outputs(
            self.saved.task_type, self.outputs(prepared, ranks), self.saved.label_names, self.saved.thresholds
        )
        counts = Counter[str]()
        for member, documents in zip(self.members, prepared, strict=True):
            counts.update({f"{what}, by {member.classifier.name}": n for what, n in member.cut(documents).items()})
        return Part(lines, counts)

    def outputs(self, prepared: Sequence[Documents], ranks: Ranks) -> np.ndarray:
        """Blended probabilities, float64 [documents, classes], in the order of the ensemble's names; or numbers."""
        pairs = zip(self.members, prepared, strict=True)
        return self.blended([member.outputs(documents, ranks) for member, documents in pairs])

    def blended(self, of_members: Sequence[np.ndarray]) -> np.ndarray:
        """The blend of what the members say of the same rows, each in the order of its own classes."""
        pairs = zip(of_members, self.orders, strict=True)
        ordered = [own if order is None else own[:, order] for own, order in pairs]
        mixed = blend if self.saved.task_type == SINGLE_LABEL else weighted_sum
        return mixed(ordered, self.saved.weights)

    def flat(self, line: Line) -> Line:
        """As of one classifier."""
        return flat_prediction(line, self.saved.task_type, self.saved.label_names)


def open_ensemble(saved: SavedEnsemble, load: Callable[[str], Classifier], **sizes: int | None) -> EnsemblePredictor:
    """The predictor of an ensemble whose members `load` opens by the folders of their runs."""
    return EnsemblePredictor(saved, [TextPredictor(load(run), **sizes) for run in saved.runs])


def _order(saved: SavedEnsemble, classifier: Classifier) -> list[int] | None:
    """Where each of the ensemble's classes is in a member; None where they are in one order, or have no names."""
    if classifier.task_type != saved.task_type:
        raise UserError(
            f"{saved.folder / ENSEMBLE} is of {saved.task_type}, and its member {classifier.name} of "
            f"{classifier.task_type}"
        )
    names = classifier.label_names
    if names is None or saved.label_names is None:
        return None
    order = NameIndex(names).order_of(saved.label_names)
    if order is None:
        raise UserError(
            f"{saved.folder / ENSEMBLE} has the classes {listed(saved.label_names)}, and its member "
            f"{classifier.name} has {listed(names)}"
        )
    return None if order == list(range(len(names))) else order
