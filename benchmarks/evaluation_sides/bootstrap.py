"""How long 10,000 resamples of 50,000 rows take, for accuracy, F1, log loss and Brier score."""

import statistics
import time
from argparse import Namespace
from typing import Any

import numpy as np

from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.statistics.resampling import score

RESAMPLES, ROWS, CLASSES = 10_000, 50_000, 2
METRICS = ("accuracy", "f1_macro", "log_loss", "brier")
TO_REACH_SECONDS = 3.0


def measure(given: Namespace) -> dict[str, Any]:
    """The median of `given.rounds`, and what two areas under curves cost at the 2,000 resamples of every day."""
    chance = np.random.default_rng(0)
    probabilities, labels = chance.dirichlet(np.ones(CLASSES), ROWS), chance.integers(0, CLASSES, ROWS)
    made = classification_statistics(labels, probabilities)
    seconds = [_timed(made, METRICS, RESAMPLES) for _ in range(given.rounds)]
    print(f"bootstrap: {', '.join(METRICS)}: {', '.join(f'{s:.2f}' for s in seconds)} s")
    areas = _timed(made, ("roc_auc", "pr_auc"), 2_000)
    print(f"bootstrap: roc_auc, pr_auc, 2,000 resamples: {areas:.2f} s")
    return {
        "resamples": RESAMPLES,
        "rows": ROWS,
        "metrics": METRICS,
        "seconds": round(statistics.median(seconds), 3),
        "areas_2000_seconds": round(areas, 3),
        "reached": statistics.median(seconds) <= TO_REACH_SECONDS,
    }


def _timed(made: Any, metrics: tuple[str, ...], resamples: int) -> float:
    started = time.perf_counter()
    found = score(made, ROWS, only=metrics, resamples=resamples)
    took = time.perf_counter() - started
    assert set(found.intervals) == set(metrics)
    return took
