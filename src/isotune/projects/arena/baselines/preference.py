"""Baselines of the Arena from rows to predictions: searched, chosen, fitted on everything, blended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from isotune.projects.arena.baselines.blend import blend, blend_weights, held_out_blend
from isotune.projects.arena.baselines.estimators import Grids, SwapAveraged
from isotune.projects.arena.baselines.feature_matrix import FeatureMatrix, Measured, measure
from isotune.projects.arena.baselines.search import Tried, best_of_each, search
from isotune.projects.arena.battles import Battle

BLEND, PRIOR = "blend", "class_prior"


@dataclass(frozen=True)
class Baselines:
    """Fitted models and how they were chosen.

    Attributes:
        chosen: the best point of each model, by name.
        weights: share of each in the blend, by name.
        held_out: by name, with BLEND and the class PRIOR, what was said of each training row by models, weights and
            shares that had not seen its prompt: float64 [rows, 3].
    """

    design: FeatureMatrix
    members: dict[str, SwapAveraged]
    chosen: dict[str, Tried]
    weights: dict[str, float]
    prior: np.ndarray
    held_out: dict[str, np.ndarray]

    def predict(self, battles: Sequence[Battle]) -> dict[str, np.ndarray]:
        """Probabilities of a, b and tie by the name of the model, BLEND among them: float64 [rows, 3] each.

        Exchanging the answers of a row exchanges its first two numbers, bit for bit, and a row's numbers do not depend
        on which other rows are predicted with it.
        """
        views = self.design.transform(measure(battles))
        with threadpool_limits(1):
            found = {name: member.predict(*views) for name, member in self.members.items()}
        mixed = blend(list(found.values()), np.array([self.weights[name] for name in found]))
        return {PRIOR: np.tile(self.prior, (len(battles), 1)), **found, BLEND: mixed}


def fit_baselines(
    battles: Sequence[Battle],
    grids: Grids,
    *,
    folds: int,
    seed: int,
    jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Baselines:
    """Choose each model's values by cross-validation over prompts, the blend's weights by the same, and fit on all.

    Args:
        battles: each with its label.
        grids: as `isotune.projects.arena.baselines.estimators.check_grids` gives them.
        jobs: processes, -1 for one a core; the result is the same.
        say: takes lines about the progress.
    """
    rows = measure(battles)
    labels = np.array([battle.label for battle in battles], np.int64)
    groups = np.array([battle.group() for battle in battles])
    say(f"measured {len(rows):,} rows, {rows.given.shape[1]} features")
    tried, fold_of = search(rows, labels, groups, grids, folds=folds, seed=seed, jobs=jobs, say=say)
    chosen = best_of_each(tried)
    held_out = {name: one.held_out for name, one in chosen.items()}
    weights = blend_weights(list(held_out.values()), labels)
    design = FeatureMatrix(seed).fit(rows)
    members = _fit_all(rows, design, chosen, labels, groups, seed, jobs)
    say(f"fitted {len(members)} models on all rows")
    return Baselines(
        design=design,
        members=members,
        chosen=chosen,
        weights=dict(zip(chosen, weights.tolist(), strict=True)),
        prior=class_prior(labels),
        held_out={
            PRIOR: _held_out_prior(labels, fold_of),
            **held_out,
            BLEND: held_out_blend(list(held_out.values()), labels, fold_of),
        },
    )


def class_prior(labels: np.ndarray) -> np.ndarray:
    """The shares of the classes, each counted once more than it is there (Laplace), a and b alike: float64 [3]."""
    shares = (np.bincount(labels, minlength=3) + 1) / (len(labels) + 3)
    either = (shares[0] + shares[1]) / 2
    return np.array([either, either, shares[2]])


def _held_out_prior(labels: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    by_fold = np.stack([class_prior(labels[fold_of != fold]) for fold in range(int(fold_of.max()) + 1)])
    return by_fold[fold_of]


def _fit_all(
    rows: Measured,
    design: FeatureMatrix,
    chosen: dict[str, Tried],
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int,
    jobs: int,
) -> dict[str, SwapAveraged]:
    views = design.transform(rows)

    def one(name: str) -> SwapAveraged:
        with threadpool_limits(1):
            return SwapAveraged(name, chosen[name].parameters, seed).fit(*views, labels, groups)

    found: Any = Parallel(n_jobs=jobs)(delayed(one)(name) for name in chosen)
    return dict(zip(chosen, found, strict=True))
