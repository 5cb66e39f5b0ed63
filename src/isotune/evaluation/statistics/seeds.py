"""Differences of two recipes over seeds, which tell an improvement from what another seed would have done too.

A seed decides the order of the data, dropout, new weights and, with `eval_split_share`, the evaluated rows. Two runs of
one seed share all of it, so their difference varies less than either, and seeds are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isotune.evaluation.statistics.resampling import LEVEL


@dataclass(frozen=True)
class SeedDifference:
    """B - A, the mean over seeds.

    Attributes:
        low: to `high`, the 95% interval of the mean; both None where the seeds do not say.
        p: of no difference; None of a single seed, which shows no noise.
    """

    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def compare_seeds(a: Sequence[float], b: Sequence[float]) -> SeedDifference:
    """The difference of two systems by a value of each for every seed, in the order of the seeds.

    By Student's paired t-test. Where every seed differs by the same amount, as coarse metrics may, that test would be
    certain after two seeds: p is then that of the exact swap test, in which two of all 2^n assignments of
    signs differ by as much, and there is no interval.
    """
    from scipy.stats import ttest_rel

    differences = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    whole = float(differences.mean())
    if len(differences) < 2:
        return SeedDifference(whole)
    if np.ptp(differences) <= 1e-9 * max(float(np.abs(differences).max()), 1e-9):
        return SeedDifference(whole, p=1.0 if whole == 0 else 2.0 ** (1 - len(differences)))
    test = ttest_rel(b, a)
    low, high = test.confidence_interval(LEVEL)
    return SeedDifference(whole, float(low), float(high), float(test.pvalue))
