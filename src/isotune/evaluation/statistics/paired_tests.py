"""Paired tests of two systems on the same rows: exact and resampled.

A metric is an `OfSums` of each system over the same rows: what a row adds to each sum, and a function of the sums. So
one test serves a mean over rows and a metric of the whole corpus, such as BLEU or macro F1.
"""

from collections.abc import Sequence

import numpy as np

from isotune.evaluation.statistics.resampling import LEVEL, OfSums, Statistic, bootstrap_draws

RESAMPLES = 10_000
_BLOCK_ELEMENTS = 2**22  # of a block of exchanges: 32 MB


def mcnemar(only_a: int, only_b: int) -> tuple[float, float]:
    """p and mid-p of McNemar's test on the rows that one system alone has right: under the null each is a fair coin.

    p is exact, and conservative where few rows changed. mid-p is less so: it counts half of the probability of the
    observed outcome (Fagerland, Lydersen and Laake 2013).
    """
    from scipy.stats import binom, binomtest

    changed = only_a + only_b
    if changed == 0:
        return 1.0, 1.0
    p = float(binomtest(only_a, changed, 0.5).pvalue)
    observed = float(binom.pmf(only_a, changed, 0.5))
    return p, p - observed if only_a != only_b else 1.0 - observed / 2


def swap_test(a: OfSums, b: OfSums, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, float]:
    """p of the difference of each metric, by name, when the two outputs of a row are exchanged at random.

    Under the null the outputs of a row are exchangeable (Noreen 1989); for a mean of rows this is the sign-flip test.
    The observed difference counts as one of the resamples, so p is never 0 and the test keeps its level with any number
    of them. A metric that is NaN for either system has p NaN; where an exchange makes it so, it counts as extreme.
    """
    columns_a, columns_b = a.columns.astype(np.float64), b.columns.astype(np.float64)
    changed = (columns_b - columns_a)[np.any(columns_a != columns_b, axis=1)]
    sums_a, sums_b = columns_a.sum(axis=0), columns_b.sum(axis=0)
    observed = np.abs(b.function(sums_b[None]) - a.function(sums_a[None]))[0]
    at_least = np.zeros(len(observed))
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // max(1, len(changed)))
    for start in range(0, resamples, block):
        size = (min(block, resamples - start), -(-len(changed) // 8))
        swaps = np.unpackbits(generator.integers(0, 256, size, dtype=np.uint8), axis=1, count=len(changed))
        moved = swaps.astype(np.float64) @ changed
        differences = np.abs(b.function(sums_b - moved) - a.function(sums_a + moved))
        # the tolerance is for sums of the same numbers in another order
        extreme = differences >= observed - 1e-9 * np.maximum(observed, 1e-3)
        at_least += (extreme | np.isnan(differences)).sum(axis=0)
    p_values = np.where(np.isnan(observed), np.nan, np.where(observed == 0, 1.0, (1 + at_least) / (1 + resamples)))
    return dict(zip(a.names, p_values.tolist(), strict=True))


def paired_bootstrap(
    a: Sequence[Statistic], b: Sequence[Statistic], rows: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float, float]]:
    """95% interval (low, high) of B - A and p of no difference, by metric, with the same resampled rows for both.

    A metric that is undefined in all resamples is left out.
    """
    draws_a, draws_b = bootstrap_draws(a, rows, resamples, seed), bootstrap_draws(b, rows, resamples, seed)
    results = {}
    for name in draws_a.keys() & draws_b.keys():
        differences = draws_b[name] - draws_a[name]
        known = differences[np.isfinite(differences)]
        if len(known):
            low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
            tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
            results[name] = low, high, min(1.0, 2 * (1 + tail) / (1 + len(known)))
    return results


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the family-wise error rate at 0.05 is at most 5%."""
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted.tolist()
