"""The metrics of texts with any number of labels, each as a statistic of weighted rows.

A label that no row has and none is given counts as 0 in the macro means, as with `zero_division=0` in scikit-learn; its
own precision of 0 / 0, where none is given, and recall, where no row has it, are undefined.
"""

from collections.abc import Sequence

import numpy as np

from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.evaluation.metrics.classification import KINDS, SMALLEST, class_scores, class_suffixes, observed
from isotune.evaluation.statistics.resampling import OfSums, Statistic, mean, share

AVERAGES = ("micro", "macro")
MULTI_LABEL_METRICS = (
    *KINDS, *(f"{kind}_{average}" for kind in KINDS for average in AVERAGES), "exact_match", "hamming_loss", "log_loss",
)  # fmt: skip


def multi_label_statistics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str] | None = None,
    thresholds: Thresholds = THRESHOLD,
) -> list[Statistic]:
    """All statistics of labels, 0 or 1 [rows, labels], and their probabilities, float64 [rows, labels].

    A row has a label from its threshold on. `exact_match` is the share of rows with all labels right, `hamming_loss`
    the share of wrong ones among all, `log_loss` is in nats for a row and label. `names` are those of the labels.
    """
    truth, chosen = labels.astype(bool), probabilities >= np.asarray(thresholds)
    count = truth.shape[1]
    columns = np.hstack([truth & chosen, truth, chosen]).astype(np.float64)
    suffixes = class_suffixes(count, names)
    means = [f"{kind}_{average}" for kind in KINDS for average in AVERAGES]
    per_label = [kind + suffix for kind in KINDS for suffix in suffixes]
    shares = {f"precision{suffix}": ([k], [2 * count + k]) for k, suffix in enumerate(suffixes)}
    shares |= {f"recall{suffix}": ([k], [count + k]) for k, suffix in enumerate(suffixes)}
    sure = np.clip(np.where(truth, probabilities, 1 - probabilities), SMALLEST, 1 - SMALLEST)
    wrong = truth != chosen
    return [
        OfSums((*means, *per_label), columns, _from_counts, shares),
        share("exact_match", (~wrong.any(axis=1)).astype(np.float64)),
        share("hamming_loss", wrong.mean(axis=1)),
        mean("log_loss", -np.log(sure).mean(axis=1)),
    ]


def _from_counts(sums: np.ndarray) -> np.ndarray:
    """[block, 3 K] counts of hits, labels and predictions of each label -> [block, 6 + 3 K] statistics."""
    hits, labels, predictions = np.split(sums, 3, axis=1)
    of_label = class_scores(hits, labels, predictions)  # [block, 3, K]
    micro = class_scores(*(counts.sum(axis=1, keepdims=True) for counts in (hits, labels, predictions)))
    means = np.concatenate([micro, of_label.mean(axis=2, keepdims=True)], axis=2).reshape(len(sums), -1)
    known = np.where(observed(labels, predictions), of_label, np.nan)
    return np.hstack([means, known.reshape(len(sums), -1)])
