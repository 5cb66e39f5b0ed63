"""Blend models with weights that minimize the log loss of their held-out predictions."""

from collections.abc import Sequence

import numpy as np

from isotune.projects.arena.baselines.estimators import normalize

MAX_ITERATIONS = 2_000
TOLERANCE_NATS = 1e-10  # iterations end when the loss falls by less


def blend_weights(held_out: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The weights that minimize the log loss of the blended held-out predictions, each float64 [rows, 3].

    The loss is convex in the weights and each iteration of expectation maximization lowers it, so the minimum is global
    (Dempster, Laird and Rubin 1977, for a mixture with fixed components).

    Returns:
        float64 [models]; not negative, with sum 1.
    """
    of_label = np.stack([prediction[np.arange(len(labels)), labels] for prediction in held_out])
    weights = np.full(len(of_label), 1 / len(of_label))
    loss = np.inf
    for _ in range(MAX_ITERATIONS):
        mixed = weights @ of_label
        before, loss = loss, float(-np.log(mixed).mean())
        if before - loss < TOLERANCE_NATS:
            break
        weights = weights * (of_label / mixed).mean(axis=1)
        weights /= weights.sum()
    return weights


def blend(predictions: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The weighted mean of predictions, each float64 [rows, 3].

    They are added in their order, so exchanging a and b in all of them exchanges a and b in the blend, to the bit.
    """
    mixed = np.zeros_like(predictions[0])
    for prediction, weight in zip(predictions, weights, strict=True):
        mixed = mixed + weight * prediction
    return normalize(mixed)


def held_out_blend(held_out: Sequence[np.ndarray], labels: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """The blend's prediction of each row with weights of the other folds, [rows, 3]; `fold_of` is int64 [rows]."""
    mixed = np.empty_like(held_out[0])
    for fold in np.unique(fold_of):
        train, test = fold_of != fold, fold_of == fold
        weights = blend_weights([prediction[train] for prediction in held_out], labels[train])
        mixed[test] = blend([prediction[test] for prediction in held_out], weights)
    return mixed
