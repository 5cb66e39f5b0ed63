"""A blend of models weighs them by what they said of rows that they had not seen."""

from collections.abc import Sequence

import numpy as np

from isotune.projects.arena.baselines.estimators import normalised

ROUNDS = 2_000
STILL = 1e-10  # nats: rounds end where none wins this much


def blend_weights(held_out: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The shares that minimise the log loss of the mixed held-out predictions, each float64 [rows, 3].

    The loss is convex in the shares and each round of expectation maximisation lowers it, so they are the best there
    are (Dempster, Laird and Rubin 1977, for a mixture whose components are fixed).

    Returns:
        float64 [members]; not negative, summing to 1.
    """
    of_truth = np.stack([one[np.arange(len(labels)), labels] for one in held_out])
    weights = np.full(len(of_truth), 1 / len(of_truth))
    loss = np.inf
    for _ in range(ROUNDS):
        mixed = weights @ of_truth
        before, loss = loss, float(-np.log(mixed).mean())
        if before - loss < STILL:
            break
        weights = weights * (of_truth / mixed).mean(axis=1)
        weights /= weights.sum()
    return weights


def blend(predictions: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The weighted mean of predictions, each float64 [rows, 3].

    Members are added in their order, so exchanging a and b in all of them exchanges them here, to the bit.
    """
    mixed = np.zeros_like(predictions[0])
    for one, weight in zip(predictions, weights, strict=True):
        mixed = mixed + weight * one
    return normalised(mixed)


def held_out_blend(held_out: Sequence[np.ndarray], labels: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """What the blend says of each row with weights from the other folds: float64 [rows, 3]; `fold_of`: int64 [rows]."""
    mixed = np.empty_like(held_out[0])
    for fold in np.unique(fold_of):
        others, here = fold_of != fold, fold_of == fold
        weights = blend_weights([one[others] for one in held_out], labels[others])
        mixed[here] = blend([one[here] for one in held_out], weights)
    return mixed
