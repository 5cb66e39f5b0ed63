"""How often answers are preferred, with and without the part that their length has in it."""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from isotune.evaluation.statistics.resampling import OfWeights, Statistic, share

NEWTON_STEPS, LARGEST_LOGIT = 40, 15.0
PRIOR = 1e-2  # of the squared slope and intercept: the fit exists where every row is won, too


def win_rates(scores: np.ndarray, agree: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray) -> list[Statistic]:
    """The statistics of a judgement, over rows.

    `scores` are the shares of the answers, float64 [rows]: 1 preferred in both orders, 0.5 a tie or preferred in one;
    `agree` says whether both orders have the same verdict, bool [rows]; lengths are characters, [rows].

    win_rate is the mean score, judged_tie the share of rows with 0.5, position_agreement that of `agree`, and
    win_rate_same_length the win rate of answers as long as the others' by `length_controlled`.
    """
    difference = lengths.astype(np.float64) - other_lengths
    return [
        share("win_rate", scores),
        length_controlled(scores, difference),
        share("judged_tie", (scores == 0.5).astype(np.float64)),
        share("position_agreement", agree.astype(np.float64)),
    ]


def length_controlled(scores: np.ndarray, difference: np.ndarray) -> OfWeights:
    """The win rate at a length difference of 0: expit(a) of the fit scores ~ expit(a + b tanh(difference / spread)).

    Dubois et al. 2024, "Length-Controlled AlpacaEval", without its term of a question's difficulty. The spread is the
    standard deviation of the differences, in characters; a and b have a weak prior. Where all differences are 0 it is
    the plain win rate.
    """
    spread = difference.std()
    regressor = np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))

    def fit(weights: np.ndarray) -> np.ndarray:
        counts = weights.astype(np.float64)
        if not regressor.any():
            return counts @ scores[:, None] / counts.sum(axis=1, keepdims=True)
        a, b = np.zeros(len(counts)), np.zeros(len(counts))
        for _ in range(NEWTON_STEPS):
            rates = expit(a[:, None] + b[:, None] * regressor)
            residuals, curvature = counts * (scores - rates), counts * rates * (1 - rates)
            by_a, by_b = residuals.sum(axis=1) - PRIOR * a, residuals @ regressor - PRIOR * b
            aa, ab = curvature.sum(axis=1) + PRIOR, curvature @ regressor
            bb = curvature @ regressor**2 + PRIOR
            determinant = aa * bb - ab**2
            step_a, step_b = (bb * by_a - ab * by_b) / determinant, (aa * by_b - ab * by_a) / determinant
            # a full step can overshoot where rates are near 0 or 1
            scale = np.minimum(1.0, 2.0 / np.maximum(np.hypot(step_a, step_b), 1e-12))
            a = np.clip(a + scale * step_a, -LARGEST_LOGIT, LARGEST_LOGIT)
            b = np.clip(b + scale * step_b, -LARGEST_LOGIT, LARGEST_LOGIT)
            if max(np.abs(scale * step_a).max(), np.abs(scale * step_b).max()) < 1e-10:
                break
        return expit(a)[:, None]

    return OfWeights(("win_rate_same_length",), len(scores), fit)


def scores_of(first: Sequence[float], swapped: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The score of each row, and whether both orders agree; `swapped` are the shares of the other answer."""
    one, other = np.asarray(first, np.float64), 1.0 - np.asarray(swapped, np.float64)
    return (one + other) / 2, one == other
