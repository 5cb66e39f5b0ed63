"""A 95% interval holds the truth 95 times in 100: measured on data sets whose truth is known in closed form."""

import numpy as np
import pytest
from scipy import stats

from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.statistics.resampling import score

DATA_SETS, ROWS, RESAMPLES = 2_000, 500, 1_000
SHARE = 0.65  # of class 1
APART, SLOPE, SHIFT = (
    1.2,
    1.6,
    0.3,
)  # the score is N(-APART/2 or APART/2, 1), and taken for a logit that is not quite right
STARS = np.array([[20, 6, 2, 0], [5, 14, 6, 1], [1, 5, 13, 6], [0, 2, 5, 14]]) / 100  # actual by predicted


def two_classes(chance):
    """Labels and probabilities of ROWS texts."""
    labels = (chance.random(ROWS) < SHARE).astype(int)
    scores = chance.normal(APART * (labels - 0.5))
    sure = 1 / (1 + np.exp(-(SLOPE * scores + SHIFT)))
    return labels, np.column_stack([1 - sure, sure])


def truth_of_two_classes():
    """The same metrics of endlessly many rows, by quadrature."""
    grid = np.linspace(-9, 9, 200_001)
    step = grid[1] - grid[0]
    sure = 1 / (1 + np.exp(-(SLOPE * grid + SHIFT)))
    density = [(1 - SHARE) * stats.norm.pdf(grid, -APART / 2), SHARE * stats.norm.pdf(grid, APART / 2)]
    taken = sure > 0.5
    hit = [density[0][~taken].sum() * step, density[1][taken].sum() * step]
    predicted = [(density[0] + density[1])[~taken].sum() * step, (density[0] + density[1])[taken].sum() * step]
    return {
        "accuracy": sum(hit),
        "f1_macro": np.mean([2 * hit[k] / (predicted[k] + (1 - SHARE, SHARE)[k]) for k in (0, 1)]),
        "precision_class_1": hit[1] / predicted[1],
        "log_loss": -(density[0] * np.log(1 - sure) + density[1] * np.log(sure)).sum() * step,
        "brier": (density[0] * sure**2 + density[1] * (1 - sure) ** 2).sum() * step,
        "roc_auc": stats.norm.cdf(APART / np.sqrt(2)),
    }


def stars(chance):
    cells = chance.choice(16, ROWS, p=STARS.ravel())
    return cells // 4, np.eye(4)[cells % 4]


def truth_of_stars():
    k = np.arange(4)
    actual, predicted, hits = STARS.sum(axis=1), STARS.sum(axis=0), np.diag(STARS)
    squared = (k[:, None] - k) ** 2
    f1 = 2 * hits / (actual + predicted)
    return {
        "accuracy": hits.sum(),
        "f1_macro": f1.mean(),
        "f1_weighted": f1 @ actual,
        "mean_absolute_error": (STARS * abs(k[:, None] - k)).sum(),
        "quadratic_kappa": 1 - (STARS * squared).sum() / (np.outer(actual, predicted) * squared).sum(),
    }


def coin(chance):
    """A classifier that knows nothing, on labels that mean nothing."""
    sure = chance.random(ROWS)
    return chance.integers(0, 2, ROWS), np.column_stack([1 - sure, sure])


CHANCE = {"accuracy": 0.5, "roc_auc": 0.5, "f1_micro": 0.5, "brier": 1 / 3}


def coverage(simulate, truth, data_sets):
    held = dict.fromkeys(truth, 0)
    for seed in range(data_sets):
        labels, probabilities = simulate(np.random.default_rng([seed, 11]))
        statistics = classification_statistics(labels, probabilities, ordinal=True)
        found = score(statistics, ROWS, only=truth, resamples=RESAMPLES, seed=seed)
        for name, (low, high) in found.intervals.items():
            held[name] += low <= truth[name] <= high
    return {name: count / data_sets for name, count in held.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("simulate", "truth"), [(two_classes, truth_of_two_classes()), (stars, truth_of_stars()), (coin, CHANCE)]
)
def test_intervals_hold_the_truth_in_93_to_97_of_100_data_sets(simulate, truth):
    found = coverage(simulate, truth, DATA_SETS)
    print(simulate.__name__, found)
    assert all(0.93 <= share <= 0.97 for share in found.values()), found


def test_intervals_on_random_labels_hold_chance_and_those_of_a_classifier_that_learned_do_not():
    assert all(share >= 0.88 for share in coverage(coin, CHANCE, 100).values())
    learned = score(classification_statistics(*two_classes(np.random.default_rng(5))), ROWS, only=CHANCE)
    assert learned.intervals["accuracy"][0] > SHARE > 0.5 and learned.intervals["roc_auc"][0] > 0.5
