"""The Arena's baselines from battles to predictions: grid search, fit on all rows, blend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from isotune.projects.arena.baselines.blend import blend, blend_weights, held_out_blend
from isotune.projects.arena.baselines.estimators import Grids, SwapAveraged
from isotune.projects.arena.baselines.feature_matrix import FeatureMatrix, battle_features
from isotune.projects.arena.baselines.search import Candidate, best_candidates, search
from isotune.projects.arena.battles import Battle

BLEND, PRIOR = "blend", "class_prior"


@dataclass(frozen=True)
class Baselines:
    """Fitted models and the search that selected them.

    Attributes:
        models, selected, weights: by name, the fitted model, its best candidate and its weight in the blend.
        held_out: by name, with BLEND and the class PRIOR, predictions of each training row by models and weights that
            were fitted without its prompt: float64 [rows, 3].
    """

    matrix: FeatureMatrix
    models: dict[str, SwapAveraged]
    selected: dict[str, Candidate]
    weights: dict[str, float]
    prior: np.ndarray
    held_out: dict[str, np.ndarray]

    def predict(self, battles: Sequence[Battle]) -> dict[str, np.ndarray]:
        """Probabilities of a, b and tie by the name of the model, with PRIOR and BLEND: float64 [rows, 3] each.

        Exchanging the answers of a row exchanges its first two probabilities, bit for bit. A row's prediction does not
        depend on the other rows.
        """
        inputs = self.matrix.transform(battle_features(battles))
        with threadpool_limits(1):
            predictions = {name: model.predict(*inputs) for name, model in self.models.items()}
        mixed = blend(list(predictions.values()), np.array([self.weights[name] for name in predictions]))
        return {PRIOR: np.tile(self.prior, (len(battles), 1)), **predictions, BLEND: mixed}


def fit_baselines(
    battles: Sequence[Battle],
    grids: Grids,
    *,
    folds: int,
    seed: int,
    jobs: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> Baselines:
    """Select each model's parameters and the blend's weights by cross-validation over prompts, then fit on all rows.

    Args:
        battles: with labels.
        grids: from `isotune.projects.arena.baselines.estimators.check_grids`.
        jobs: processes, -1 for one per core; they do not change the result.
        log: takes lines about the progress.
    """
    rows = battle_features(battles)
    labels = np.array([battle.label for battle in battles], np.int64)
    groups = np.array([battle.group() for battle in battles])
    log(f"computed {rows.given.shape[1]} features of {len(rows):,} rows")
    candidates, fold_of = search(rows, labels, groups, grids, folds=folds, seed=seed, jobs=jobs, log=log)
    selected = best_candidates(candidates)
    held_out = {name: candidate.held_out for name, candidate in selected.items()}
    weights = blend_weights(list(held_out.values()), labels)
    matrix = FeatureMatrix(seed).fit(rows)
    inputs = matrix.transform(rows)

    def fit(name: str) -> SwapAveraged:
        with threadpool_limits(1):
            return SwapAveraged(name, selected[name].parameters, seed).fit(*inputs, labels, groups)

    models: Any = Parallel(n_jobs=jobs)(delayed(fit)(name) for name in selected)
    log(f"fitted {len(models)} models on all rows")
    return Baselines(
        matrix=matrix,
        models=dict(zip(selected, models, strict=True)),
        selected=selected,
        weights=dict(zip(selected, weights.tolist(), strict=True)),
        prior=class_prior(labels),
        held_out={
            PRIOR: _held_out_prior(labels, fold_of),
            **held_out,
            BLEND: held_out_blend(list(held_out.values()), labels, fold_of),
        },
    )


def class_prior(labels: np.ndarray) -> np.ndarray:
    """Class frequencies with Laplace smoothing, the same for a and b: float64 [3]."""
    frequencies = (np.bincount(labels, minlength=3) + 1) / (len(labels) + 3)
    either = (frequencies[0] + frequencies[1]) / 2
    return np.array([either, either, frequencies[2]])


def _held_out_prior(labels: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    by_fold = np.stack([class_prior(labels[fold_of != fold]) for fold in range(int(fold_of.max()) + 1)])
    return by_fold[fold_of]
