"""Blends of predicted probabilities: a weighted mean, whose weights minimize the log loss of held-out predictions."""

from collections.abc import Sequence

import numpy as np

MAX_ITERATIONS = 2_000
TOLERANCE_NATS = 1e-10  # iterations of the weights end when the loss falls by less
SMALLEST = float(np.finfo(np.float64).eps)  # of a probability: the log of 0 is infinite

Splits = Sequence[tuple[np.ndarray, np.ndarray]]  # indices of the rows to fit on and of those held out, for each fold


def normalize(weights: np.ndarray) -> np.ndarray:
    """Rows scaled to sum 1, [rows, classes]; the first two are added first, so exchanging them changes no bit."""
    total = weights[:, 0]
    for column in range(1, weights.shape[1]):
        total = total + weights[:, column]
    return weights / total[:, None]


def blend(predictions: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The weighted mean of probabilities, each float64 [rows, classes]."""
    return normalize(weighted_sum(predictions, weights))


def weighted_sum(predictions: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The sum of predictions of one shape, each times its weight.

    In their order: exchanging two classes in all of them exchanges them in the sum, to the bit.
    """
    mixed = np.zeros_like(predictions[0])
    for prediction, weight in zip(predictions, weights, strict=True):
        mixed = mixed + weight * prediction
    return mixed


def blend_weights(held_out: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The weights, float64 [models] with sum 1, that minimize the log loss of blended predictions.

    Each prediction is float64 [rows, classes], and `labels` are classes, int64 [rows]; or it has the probabilities of
    labels, [rows, labels], and `labels` say whether a row has them, in the same shape. The loss is convex in the
    weights and each iteration of expectation maximization lowers it, so the minimum is global (Dempster, Laird and
    Rubin 1977, for a mixture with fixed components).
    """
    of_label = np.stack([probabilities_of_truth(prediction, labels) for prediction in held_out])
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


def probabilities_of_truth(prediction: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability that a prediction gives to what is true of each row, or of each row and label: float64, flat."""
    if labels.ndim == 1:
        found = prediction[np.arange(len(labels)), labels]
    else:
        found = np.where(labels.astype(bool), prediction, 1 - prediction).ravel()
    return np.clip(found, SMALLEST, 1.0)


def held_out_blend(held_out: Sequence[np.ndarray], labels: np.ndarray, splits: Splits) -> np.ndarray:
    """The blend's prediction of each row with weights of the other folds: float64, in the shape of the predictions."""
    mixed = np.empty_like(held_out[0])
    for train, test in splits:
        weights = blend_weights([prediction[train] for prediction in held_out], labels[train])
        of_fold = [prediction[test] for prediction in held_out]
        mixed[test] = blend(of_fold, weights) if labels.ndim == 1 else weighted_sum(of_fold, weights)
    return mixed
