"""The tests of the comparison are those of the textbooks, hold their level, and see a difference that is there."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests

from isotune.evaluation.statistics.paired_tests import holm, mcnemar, paired_bootstrap, swap_test
from isotune.evaluation.statistics.resampling import OfSums, OfWeights, mean, ratio

DATA_SETS = 2_000


def test_mcnemar_is_that_of_statsmodels():
    for only_a, only_b in product((0, 1, 2, 5, 17, 60, 400), repeat=2):
        theirs = their_mcnemar([[10, only_a], [only_b, 10]], exact=True)
        assert mcnemar(only_a, only_b)[0] == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-300)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mid_p_counts_half_of_what_was_seen(only_a, only_b):
    changed = only_a + only_b
    shares = [math.comb(changed, k) / 2**changed for k in range(changed + 1)]
    if only_a == only_b:
        expected = 1 - shares[only_a] / 2 if changed else 1.0
    else:
        fewer = min(only_a, only_b)
        expected = 2 * (sum(shares[:fewer]) + shares[fewer] / 2)
    assert mcnemar(only_a, only_b)[1] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p_values):
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], rtol=1e-12, atol=0)


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> OfSums:
    return OfSums(("perplexity",), np.column_stack([nats, tokens]), lambda sums: np.exp(sums[:, :1] / sums[:, 1:]))


def test_the_swap_test_is_the_full_enumeration_that_it_draws_from():
    generator = np.random.default_rng(4)
    tokens = generator.integers(3, 30, 11).astype(float)
    a, b = generator.exponential(tokens), generator.exponential(tokens) + 4

    def difference(first, second, axis):
        return np.exp(second.sum(axis) / tokens.sum()) - np.exp(first.sum(axis) / tokens.sum())

    every = stats.permutation_test((a, b), difference, permutation_type="samples", n_resamples=np.inf, vectorized=True)
    found = swap_test(perplexity(a, tokens), perplexity(b, tokens), seed=1, resamples=20_000)
    deviation = math.sqrt(every.pvalue * (1 - every.pvalue) / 20_000)
    assert 0.01 < every.pvalue < 0.9
    assert found["perplexity"] == pytest.approx(every.pvalue, abs=4 * deviation)


@pytest.mark.parametrize("unit", [1.0, 0.1])
def test_every_row_is_exchanged_and_sums_in_another_order_are_equal(unit: float):
    """17 rows, whose exchanges do not end with a byte, the last one the heaviest; in tenths their sums round."""
    values = unit * np.array([*range(1, 17), 40])
    signs = np.array(list(product((1, -1), repeat=17)))
    exact = (np.abs(signs @ values) >= np.abs(values[0::2].sum() - values[1::2].sum()) - 1e-9).mean()
    a = np.where(np.arange(17) % 2, values, 0.0)
    found = swap_test(mean("m", a), mean("m", values - a), seed=3, resamples=20_000)["m"]
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


def test_a_single_row_says_nothing():
    assert swap_test(mean("m", np.array([1.0, 0.5])), mean("m", np.array([0.0, 0.5])), resamples=99)["m"] == 1.0


def test_for_ones_and_zeros_the_swap_test_is_mcnemars():
    a, b = np.repeat([1.0, 0.0, 1.0], [9, 21, 50]), np.repeat([0.0, 1.0, 1.0], [9, 21, 50])
    found = swap_test(mean("accuracy", a), mean("accuracy", b), resamples=40_000)["accuracy"]
    assert found == pytest.approx(mcnemar(9, 21)[0], abs=4 * math.sqrt(0.04 / 40_000))


def test_the_paired_interval_is_that_of_scipys_percentile_bootstrap():
    generator = np.random.default_rng(5)
    base = generator.exponential(size=300)
    a, b = base + generator.normal(size=300), base + generator.normal(size=300) + 0.1
    theirs = stats.bootstrap(
        (a, b),
        lambda first, second, axis: second.mean(axis) - first.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(6),
    ).confidence_interval
    low, high, _ = paired_bootstrap([mean("m", a)], [mean("m", b)], 300, resamples=20_000)["m"]
    width = theirs.high - theirs.low
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


def test_a_metric_of_any_kind_has_an_interval_of_its_difference():
    values = np.random.default_rng(7).normal(size=(2, 50))

    def median(row: np.ndarray) -> OfWeights:
        return OfWeights(
            ("median",), 50, lambda weights: np.array([[np.median(np.repeat(row, drawn))] for drawn in weights])
        )

    low, high, p = paired_bootstrap([median(values[0])], [median(values[1] + 9)], 50, resamples=300)["median"]
    assert 8 < low < np.median(values[1] + 9) - np.median(values[0]) < high < 10
    assert p == 2 / 301


def test_a_system_compared_with_itself_differs_in_nothing():
    values = np.random.default_rng(8).normal(size=40)
    one = [mean("m", values), ratio("r", values, np.abs(values))]
    assert all(p == 1.0 for metric in one for p in swap_test(metric, metric).values())
    for found in paired_bootstrap(one, one, 40, resamples=500).values():
        assert found == (0.0, 0.0, 1.0)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    a, b = np.random.default_rng(9).normal(size=(2, 30))
    metrics = mean("m", a), mean("m", b)
    first, again, other = (swap_test(*metrics, seed=seed, resamples=2_000)["m"] for seed in (1, 1, 2))
    assert first == again != other


def test_a_metric_that_does_not_exist_has_no_p():
    nothing = ratio("precision", np.zeros(5), np.zeros(5))
    assert math.isnan(swap_test(nothing, nothing)["precision"])
    assert paired_bootstrap([nothing], [nothing], 5, resamples=50) == {}


def test_an_exchange_that_leaves_no_metric_counts_as_extreme():
    """A predicts the class three times and is right, B three other times and is wrong: precision 1 and 0."""
    right, asked_a, asked_b = np.repeat([1.0, 0.0], 3), np.repeat([1.0, 0.0], 3), np.repeat([0.0, 1.0], 3)
    every = []
    for swaps in product((False, True), repeat=6):
        of_a, of_b = np.where(swaps, asked_b, asked_a), np.where(swaps, asked_a, asked_b)
        known = of_a.any() and of_b.any()
        every.append(not known or abs((right @ of_a) / of_a.sum() - (right @ of_b) / of_b.sum()) >= 1 - 1e-9)
    a, b = ratio("precision", right * asked_a, asked_a), ratio("precision", right * asked_b, asked_b)
    found = swap_test(a, b, seed=2, resamples=20_000)["precision"]
    assert found == pytest.approx(np.mean(every), abs=4 * math.sqrt(np.mean(every) / 20_000))


def rejected(p_of_data_set, data_sets: int = DATA_SETS) -> float:
    """The share of simulated data sets with p at most 0.05."""
    generator = np.random.default_rng(0)
    return sum(p_of_data_set(generator) <= 0.05 for _ in range(data_sets)) / data_sets


def test_the_swap_test_rejects_a_true_null_in_4_to_6_percent_of_data_sets():
    def p(generator):
        base = generator.exponential(size=60)  # rows are easy or hard for both
        a, b = (base + generator.exponential(size=60) for _ in range(2))
        return swap_test(mean("m", a), mean("m", b), seed=int(generator.integers(2**31)), resamples=199)["m"]

    assert 0.04 <= rejected(p) <= 0.06


def test_the_swap_test_of_a_corpus_metric_rejects_a_true_null_in_4_to_6_percent_of_data_sets():
    def p(generator):
        tokens = generator.integers(5, 60, 60).astype(float)
        a, b = (perplexity(generator.gamma(tokens), tokens) for _ in range(2))
        return swap_test(a, b, seed=int(generator.integers(2**31)), resamples=199)["perplexity"]

    assert 0.04 <= rejected(p) <= 0.06


@pytest.mark.slow
def test_the_paired_bootstrap_rejects_a_true_null_in_4_to_6_percent_of_data_sets():
    def p(generator):
        base = generator.exponential(size=400)
        a, b = ([mean("m", base + generator.exponential(size=400))] for _ in range(2))
        return paired_bootstrap(a, b, 400, seed=int(generator.integers(2**31)), resamples=399)["m"][2]

    assert 0.04 <= rejected(p) <= 0.06


def right_rows(generator, rows: int, both: float = 0.8) -> tuple[int, int]:
    """How many rows one of two equally good systems has right alone: (only A, only B)."""
    a, b = generator.random((2, rows)) < both
    return int((a & ~b).sum()), int((b & ~a).sum())


def test_mcnemar_exact_rejects_a_true_null_in_4_to_6_percent_of_large_data_sets():
    assert 0.04 <= rejected(lambda generator: mcnemar(*right_rows(generator, 5_000))[0]) <= 0.06


def test_on_few_rows_exact_mcnemar_rejects_less_and_mid_p_in_4_to_6_percent():
    exact = rejected(lambda generator: mcnemar(*right_rows(generator, 100))[0])
    mid = rejected(lambda generator: mcnemar(*right_rows(generator, 100))[1])
    assert exact < 0.04 <= mid <= 0.06


@pytest.mark.parametrize("shift", [0.6, -0.6])
def test_a_difference_that_is_there_is_seen(shift):
    generator = np.random.default_rng(11)
    base = generator.normal(size=150)
    a, b = base, base + shift + generator.normal(size=150)
    metrics = mean("m", a), mean("m", b)
    low, high, p = paired_bootstrap([metrics[0]], [metrics[1]], 150, resamples=2_000)["m"]
    assert swap_test(*metrics, resamples=2_000)["m"] < 0.001
    assert p < 0.01
    assert (low > 0) == (shift > 0) == (high > 0)
