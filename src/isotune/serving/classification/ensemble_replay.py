"""An ensemble's stored predictions made again, from the rows that its members' own evaluations read."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config.task_types import REGRESSION
from isotune.data.classification.predictions import prediction_lines
from isotune.data.documents import Documents
from isotune.evaluation.classification.evaluate import Rows
from isotune.evaluation.models import Classifier
from isotune.evaluation.prediction.ensembles import SavedEnsemble
from isotune.evaluation.results import CLAIM, CLASSIFICATION, read_result
from isotune.io.reading import read_json_object
from isotune.io.run_files import or_refuse
from isotune.serving.classification.ensemble import EnsembleService
from isotune.serving.classification.replay import compare, errors_among, rows_of, why_read_otherwise
from isotune.serving.replay import Evaluated, Replayed, newest_evaluation, spread

BY_FOLDS = (
    "each stored row was blended by weights of other folds, so the members' stored predictions are blended with the "
    "weights that are served, and compared"
)


@dataclass(frozen=True)
class _Member:
    """The evaluation of one member that was blended, and its rows."""

    evaluated: Evaluated
    rows: Rows
    place: dict[Any, int]  # of each id among the rows

    def documents(self, ids: list[Any]) -> Documents:
        """Some rows as the member reads them."""
        return self.rows.documents.select(np.array([self.place[one] for one in ids]))

    def outputs(self, ids: list[Any], task_type: str) -> np.ndarray:
        """What the member's evaluation says of some rows."""
        lines = {line["id"]: line for line in self.evaluated.result.predictions}
        return np.array([lines[one]["prediction" if task_type == REGRESSION else "probabilities"] for one in ids])


def replay_ensemble(service: EnsembleService, count: int) -> tuple[Replayed, list[dict[str, Any]]]:
    """Predict `count` rows from all over the blended evaluation again; and all its errors with their texts.

    Where weights were fitted to the labels of these rows each is blended by the weights of other folds, which nobody
    serves: then the members' stored predictions are blended with the weights that are served, and compared. UserError
    where no evaluation is of this blend, or its rows are not what they were.
    """
    saved, says = service.predictor.saved, service.says
    evaluated = newest_evaluation(saved.folder, CLASSIFICATION, partial(why_not, saved=saved), "isotune ensemble")
    how, stored = evaluated.result.facts["ensemble"], evaluated.result.predictions
    members = [
        _member(evaluated, Path(run, "eval", Path(own["result"]).name), classifier)
        for run, own, classifier in zip(saved.runs, how["members"], service.members, strict=True)
    ]
    lines = [stored[row] for row in spread(len(stored), count)]
    ids = [line["id"] for line in lines]
    by_folds = "folds" in how
    if by_folds:
        blended = service.predictor.blended([member.outputs(ids, says.task_type) for member in members])
        lines = prediction_lines(says.task_type, ids, None, blended, None, says.thresholds)
    outputs = service.outputs(tuple(member.documents(ids) for member in members))
    replayed = compare(evaluated, lines, outputs, says, BY_FOLDS if by_folds else "")
    first, every = members[0], [line["id"] for line in stored]
    texts = [first.rows.texts[first.place[one]] for one in every]
    rows = replace(
        first.rows, documents=first.documents(every), texts=texts, names=says.names, thresholds=says.thresholds
    )
    return replayed, errors_among(evaluated, rows)


def why_not(evaluated: Evaluated, saved: SavedEnsemble) -> str | None:
    """Why a result is not of the blend that is served; None where it is."""
    how = evaluated.result.facts.get("ensemble")
    if not isinstance(how, dict):
        return "it is of no ensemble"
    blended = [(Path(own["result"]).resolve().parents[1].name, own["weight"]) for own in how["members"]]
    served = [(Path(run).name, weight) for run, weight in zip(saved.runs, saved.weights.tolist(), strict=True)]
    return None if blended == served else "it blends other runs than ensemble.json, or with other weights"


def _member(blend: Evaluated, folder: Path, classifier: Classifier) -> _Member:
    claim = or_refuse(read_json_object, folder / CLAIM, f"{folder / CLAIM}: cannot be read")
    evaluated = Evaluated(read_result(folder), claim)
    if (reason := why_read_otherwise(evaluated, classifier)) is not None:  # the blend has thresholds
        raise blend.no_rows(f"of {folder}: {reason}")
    rows = rows_of(evaluated, classifier)
    return _Member(evaluated, rows, {one: place for place, one in enumerate(rows.ids)})
