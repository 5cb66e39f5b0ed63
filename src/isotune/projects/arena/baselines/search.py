"""Grid search by cross-validation on the training rows; all rows of a prompt are in the same fold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.model_selection import GroupKFold, ParameterGrid
from threadpoolctl import threadpool_limits

from isotune.projects.arena.baselines.estimators import Grids, SwapAveraged
from isotune.projects.arena.baselines.feature_matrix import BattleFeatures, FeatureMatrix


@dataclass(frozen=True)
class Candidate:
    """A model with a point of its grid: its held-out predictions, float64 [rows, 3], and their log loss in nats."""

    name: str
    parameters: dict[str, Any]
    held_out: np.ndarray
    log_loss: float


def search(
    rows: BattleFeatures,
    labels: np.ndarray,
    groups: np.ndarray,
    grids: Grids,
    *,
    folds: int,
    seed: int,
    jobs: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[Candidate], np.ndarray]:
    """Cross-validate every point of every grid, with folds grouped by `groups`, [rows].

    Folds run in `jobs` processes (-1: one per core), each on one core, so the result does not depend on their number.
    Threads would share Python's list of warning filters, which scikit-learn 1.9 replaces for a while.

    Returns:
        the candidates, and int64 [rows]: the fold in which each row was held out.
    """
    points = [(name, point) for name, grid in grids.items() for point in ParameterGrid(grid)]
    splits = list(GroupKFold(folds, shuffle=True, random_state=seed).split(labels, groups=groups))
    fold_of = np.empty(len(labels), np.int64)
    for fold, (_, test) in enumerate(splits):
        fold_of[test] = fold

    def run_fold(fold: int) -> tuple[int, list[np.ndarray]]:
        train, test = splits[fold]
        with threadpool_limits(1):
            matrix = FeatureMatrix(seed).fit(rows.subset(train))
            train_inputs, test_inputs = matrix.transform(rows.subset(train)), matrix.transform(rows.subset(test))
            predictions = []
            for name, point in points:
                model = SwapAveraged(name, point, seed).fit(*train_inputs, labels[train], groups[train])
                predictions.append(model.predict(*test_inputs))
        return fold, predictions

    held_out = np.empty((len(points), len(labels), 3))
    running: Any = Parallel(n_jobs=jobs, return_as="generator_unordered")
    for done, (fold, predictions) in enumerate(running(delayed(run_fold)(fold) for fold in range(folds)), start=1):
        test = splits[fold][1]
        held_out[:, test] = predictions
        log(f"fold {done} of {folds}: {len(points)} models, evaluated on {len(test):,} rows")
    candidates = []
    for (name, point), predictions in zip(points, held_out, strict=True):
        log_loss = float(-np.log(predictions[np.arange(len(labels)), labels]).mean())
        candidates.append(Candidate(name, dict(point), predictions, log_loss))
    return candidates, fold_of


def best_candidates(candidates: list[Candidate]) -> dict[str, Candidate]:
    """The candidate with the lowest log loss of each model, by name."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.name not in best or candidate.log_loss < best[candidate.name].log_loss:
            best[candidate.name] = candidate
    return best
