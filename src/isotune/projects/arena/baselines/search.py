"""Everything is chosen by cross-validation on training rows, and rows of one prompt never stand on both sides of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.model_selection import GroupKFold, ParameterGrid
from threadpoolctl import threadpool_limits

from isotune.projects.arena.baselines.estimators import Grids, SwapAveraged
from isotune.projects.arena.baselines.feature_matrix import FeatureMatrix, Measured


@dataclass(frozen=True)
class Tried:
    """A member with some values: its predictions of rows it did not learn from, float64 [rows, 3], and their loss."""

    name: str
    parameters: dict[str, Any]
    held_out: np.ndarray
    log_loss: float


def search(
    rows: Measured,
    labels: np.ndarray,
    groups: np.ndarray,
    grids: Grids,
    *,
    folds: int,
    seed: int,
    jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Tried], np.ndarray]:
    """Every point of every grid, judged by cross-validation grouped by `groups`, [rows].

    Folds run side by side in `jobs` processes (-1: one a core), each on one core, so the numbers do not depend on how
    many there are. Not in threads: those share Python's list of warnings, which scikit-learn 1.9 exchanges for a while.

    Returns:
        the points, and int64 [rows]: the fold in which each row was held out.
    """
    points = [(name, point) for name, grid in grids.items() for point in ParameterGrid(grid)]
    splits = list(GroupKFold(folds, shuffle=True, random_state=seed).split(labels, groups=groups))
    fold_of = np.empty(len(labels), np.int64)
    for number, (_, judge) in enumerate(splits):
        fold_of[judge] = number

    def one_fold(number: int) -> tuple[int, list[np.ndarray]]:
        learn, judge = splits[number]
        with threadpool_limits(1):
            design = FeatureMatrix(seed).fit(rows.subset(learn))
            views, judged = design.transform(rows.subset(learn)), design.transform(rows.subset(judge))
            found = []
            for name, point in points:
                member = SwapAveraged(name, point, seed).fit(*views, labels[learn], groups[learn])
                found.append(member.predict(*judged))
        return number, found

    by_fold: dict[int, list[np.ndarray]] = {}
    running: Any = Parallel(n_jobs=jobs, return_as="generator_unordered")
    for number, found in running(delayed(one_fold)(number) for number in range(folds)):
        by_fold[number] = found
        say(f"fold {len(by_fold)} of {folds}: {len(points)} models, judged on {len(splits[number][1]):,} rows")
    tried = []
    for (name, point), parts in zip(points, zip(*(by_fold[n] for n in range(folds)), strict=True), strict=True):
        held_out = np.empty((len(labels), 3))
        for (_, judge), part in zip(splits, parts, strict=True):
            held_out[judge] = part
        tried.append(Tried(name, dict(point), held_out, float(row_losses(held_out, labels).mean())))
    return tried, fold_of


def best_of_each(tried: list[Tried]) -> dict[str, Tried]:
    """The point of the smallest loss of each member, by name."""
    names = dict.fromkeys(each.name for each in tried)
    return {name: min((each for each in tried if each.name == name), key=lambda each: each.log_loss) for name in names}


def row_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minus the logarithm of what each row's class was given, in nats: float64 [rows]."""
    return -np.log(probabilities[np.arange(len(labels)), labels])
