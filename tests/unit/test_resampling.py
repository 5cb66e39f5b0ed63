"""The bootstrap draws exactly what a bootstrap draws, whatever the number of rows, and the same for the same seed."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.statistics.resampling import (
    OfSums,
    OfWeights,
    _corrected,
    bootstrap_draws,
    bootstrap_intervals,
    by_group,
    draw_weights,
    mean,
    ratio,
    score,
    select_names,
    share,
    values,
)
from isotune.io.errors import UserError

RECORDED = [16, 12, 20, 34, 28]  # sums of the rows 0 to 6 in the first resamples of seed 0
RECORDED_OF_300 = [43593, 45531, 43817]


@pytest.mark.parametrize("rows", [1, 2, 24, 25, 26, 100, 997])
def test_every_resample_draws_as_many_rows_as_there_are(rows):
    weights = np.concatenate(list(draw_weights(rows, 500, seed=3)))
    assert weights.shape == (500, rows) and (weights.sum(axis=1) == rows).all()


@pytest.mark.parametrize("rows", [5, 40, 1000])
def test_how_often_a_row_is_drawn_is_binomial(rows):
    drawn = np.concatenate(list(draw_weights(rows, 200_000 // rows, seed=5))).ravel()
    highest = 6
    found = np.bincount(np.minimum(drawn, highest), minlength=highest + 1)
    binomial = stats.binom(rows, 1 / rows)
    expected = len(drawn) * np.append(binomial.pmf(np.arange(highest)), binomial.sf(highest - 1))
    held = expected > 5
    # rows of one resample are all but independent, so chi-squared may be taken as it is
    assert stats.chisquare(found[held], expected[held] * found[held].sum() / expected[held].sum()).pvalue > 1e-3


def test_two_rows_of_a_resample_are_correlated_as_in_a_multinomial():
    weights = np.concatenate(list(draw_weights(30, 40_000, seed=8))).astype(float)
    covariance = np.cov(weights.T)
    assert np.allclose(np.diag(covariance), 1 - 1 / 30, atol=0.05)
    assert abs(covariance[~np.eye(30, dtype=bool)].mean() + 1 / 30) < 1e-3


def test_more_resamples_leave_the_first_as_they_were_and_another_seed_changes_them():
    first = np.concatenate(list(draw_weights(5000, 700, seed=1)))
    assert (np.concatenate(list(draw_weights(5000, 1500, seed=1)))[:700] == first).all()
    assert (np.concatenate(list(draw_weights(5000, 700, seed=2))) != first).any()


def test_sums_and_weights_are_two_ways_to_the_same_draws():
    numbers = np.random.default_rng(0).random((800, 2))
    by_sums = [mean("mean", numbers[:, 0]), ratio("ratio", numbers[:, 0], numbers[:, 1])]

    def naive(weights):
        rows = [np.repeat(np.arange(800), w) for w in weights]
        return np.array([[numbers[r, 0].mean(), numbers[r, 0].sum() / numbers[r, 1].sum()] for r in rows])

    found = bootstrap_draws([*by_sums, OfWeights(("naive_mean", "naive_ratio"), 800, naive)], 800, 300, seed=4)
    assert np.allclose(found["mean"], found["naive_mean"], rtol=1e-6)
    assert np.allclose(found["ratio"], found["naive_ratio"], rtol=1e-6)
    sums = np.concatenate(list(draw_weights(800, 300, seed=4))) @ numbers
    assert np.allclose(sums[:, 0] / sums[:, 1], found["naive_ratio"], rtol=1e-12)
    assert values(by_sums) == pytest.approx(
        {"mean": numbers[:, 0].mean(), "ratio": numbers[:, 0].sum() / numbers[:, 1].sum()}
    )


def test_an_interval_is_scipys_percentile_bootstrap_to_the_noise_of_drawing():
    numbers = np.random.default_rng(1).exponential(size=400)
    found = bootstrap_intervals([mean("mean", numbers)], 400, resamples=20_000, seed=0)["mean"]
    theirs = stats.bootstrap((numbers,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    width = theirs.high - theirs.low
    assert abs(found[0] - theirs.low) < 0.03 * width and abs(found[1] - theirs.high) < 0.03 * width


def test_a_statistic_that_some_resamples_lack_is_judged_by_the_others_and_one_that_all_lack_has_no_interval():
    marked = np.zeros(6)
    marked[0] = 1
    found = bootstrap_intervals([ratio("some", marked, marked), ratio("none", marked, np.zeros(6))], 6)
    assert found == {"some": (1.0, 1.0)}


def test_no_statistics_give_no_intervals():
    assert bootstrap_intervals([], 5) == {}
    assert values([OfSums(("total",), np.ones((3, 1)), lambda sums: sums)]) == {"total": 3.0}


def none_of(rows: int) -> float:
    """What nothing seen in so many rows leaves possible: the share whose chance of showing itself is 97.5%."""
    return 1 - 0.025 ** (1 / rows)


@pytest.mark.parametrize("rows", [1, 32, 1000])
def test_a_share_of_0_or_1_has_the_exact_interval(rows):
    shares = [share("none", np.zeros(rows)), share("all", np.ones(rows)), mean("mean", np.zeros(rows))]
    found = bootstrap_intervals(shares, rows, resamples=50)
    assert found["none"] == pytest.approx((0, none_of(rows)), rel=1e-9)
    assert found["all"] == pytest.approx((1 - none_of(rows), 1), rel=1e-9)
    assert found["mean"] == (0, 0)  # nobody said that it cannot lie above 1
    wider = bootstrap_intervals(shares[:1], rows, resamples=50, level=0.99)["none"]
    assert wider == pytest.approx((0, 1 - 0.005 ** (1 / rows)), rel=1e-9)


def test_any_other_share_has_the_interval_of_its_resamples():
    for values_of_rows in (np.repeat([1.0, 0.0], [1, 31]), np.full(32, 0.5), np.linspace(0, 1, 32)):
        found = bootstrap_intervals([share("s", values_of_rows)], 32, resamples=200)
        assert found == bootstrap_intervals([mean("s", values_of_rows)], 32, resamples=200)


def test_precision_and_recall_count_their_own_rows():
    labels = np.repeat([0, 1, 2], [20, 12, 8])
    predictions = np.repeat([0, 2, 1, 2], [14, 6, 12, 8])  # six of class 0 are taken for class 2
    statistics = classification_statistics(labels, np.eye(3)[predictions])
    found = bootstrap_intervals(statistics, 40, resamples=200)
    assert found["precision_class_0"] == pytest.approx((1 - none_of(14), 1), rel=1e-9)
    assert found["recall_class_1"] == found["precision_class_1"] == pytest.approx((1 - none_of(12), 1), rel=1e-9)
    assert found["recall_class_2"] == pytest.approx((1 - none_of(8), 1), rel=1e-9)
    assert found["accuracy"][0] < 0.85 < found["accuracy"][1] < 1
    perfect = bootstrap_intervals(classification_statistics(labels, np.eye(3)[labels]), 40, resamples=200)
    assert perfect["accuracy"] == perfect["f1_micro"] == pytest.approx((1 - none_of(40), 1), rel=1e-9)


def test_of_groups_each_is_one_witness():
    grouped = by_group(share("right", np.ones(12)), np.repeat(np.arange(4), 3))
    assert bootstrap_intervals([grouped], 4)["right"] == pytest.approx((1 - none_of(4), 1), rel=1e-9)


def test_groups_are_drawn_as_wholes_whatever_the_statistic():
    groups, numbers = np.array([2, 0, 0, 1, 2, 0]), np.array([5.0, 1, 2, 7, 11, 3])

    def weighted_mean(weights):
        return (weights @ numbers / weights.sum(axis=1))[:, None]

    rows = [mean("sums", numbers), OfWeights(("weights",), 6, weighted_mean)]
    drawn = np.concatenate(list(draw_weights(3, 400, seed=7)))
    sums, counts = np.array([6.0, 7, 16]), np.array([3, 1, 2])  # of groups 0, 1 and 2, by hand
    found = bootstrap_draws([by_group(one, groups) for one in rows], 3, 400, seed=7)
    assert np.allclose(found["sums"], drawn @ sums / (drawn @ counts), rtol=1e-6)
    assert np.allclose(found["weights"], found["sums"], rtol=1e-6)


@pytest.mark.parametrize("value", [2.0, 1.0, 0.7, 3.0])
def test_percentiles_move_by_the_share_of_resamples_below_the_value(value):
    """Efron's formula, by another library's normal, of draws whose value is not their median; ties count as halves."""
    draws = np.concatenate([np.random.default_rng(0).gamma(2.0, size=500), np.full(30, 2.0)])
    below = (np.sum(draws < value) + np.sum(draws == value) / 2) / len(draws)
    normal = NormalDist()
    moved = [normal.cdf(2 * normal.inv_cdf(below) + normal.inv_cdf(end)) for end in (0.05, 0.95)]
    expected = np.quantile(draws, moved)
    found = _corrected(draws, value, 0.9)
    assert found == pytest.approx((min(expected[0], value), max(expected[1], value)), rel=1e-9)


def test_sums_that_differ_by_the_rounding_of_fp32_are_ties():
    draws = np.tile([1.0, 1.0 + 4e-7, 1.0 - 4e-7, 2.0, 0.5], 40)
    assert _corrected(draws, 1.0, 0.9) == _corrected(np.tile([1.0, 1.0, 1.0, 2.0, 0.5], 40), 1.0, 0.9)


@pytest.mark.parametrize("value", [-5.0, 50.0])
def test_a_value_beyond_every_resample_is_in_its_interval(value):
    draws = np.random.default_rng(1).gamma(2.0, size=100)
    share, normal = (0.5 if value < 0 else 99.5) / 100, NormalDist()
    moved = [normal.cdf(2 * normal.inv_cdf(share) + normal.inv_cdf(end)) for end in (0.025, 0.975)]
    low, high = np.quantile(draws, moved)
    assert _corrected(draws, value, 0.95) == pytest.approx((min(low, value), max(high, value)), rel=1e-6)


def test_metrics_are_chosen_by_their_name_with_or_without_a_class():
    statistics = [mean("accuracy", np.ones(3)), mean("f1_class_0", np.ones(3)), mean("f1_class_1", np.zeros(3))]
    for only, expected in (
        (None, {"accuracy", "f1_class_0", "f1_class_1"}),
        ([], {"accuracy", "f1_class_0", "f1_class_1"}),
        (["f1"], {"f1_class_0", "f1_class_1"}),
        (["f1_class_1", "accuracy"], {"f1_class_1", "accuracy"}),
    ):
        assert select_names(statistics, only) == expected
    with pytest.raises(UserError, match=r"metrics: there is no 'f2' here; there are accuracy, f1$"):
        select_names(statistics, ["accuracy", "f2"])


def test_scores_have_the_metrics_that_exist_and_name_the_others():
    statistics = [
        mean("m", np.array([0.0, 1.0, 1.0])),
        ratio("none", np.ones(3), np.zeros(3)),
        mean("other", np.ones(3)),
    ]
    found = score(statistics, 3, only=["m", "none"], resamples=50)
    assert found.metrics == {"m": 2 / 3} and found.intervals.keys() == {"m"} and found.undefined == ["none"]
    both = found | score(statistics, 3, only=["other"], resamples=50)
    assert both.metrics == {"m": 2 / 3, "other": 1.0} and both.intervals.keys() == {"m", "other"}
    assert both.undefined == ["none"]


def test_the_draws_of_seed_0_are_the_default_and_are_these():
    """Recorded once: another machine or NumPy draws the same, so published intervals can be computed again."""
    whole = mean("m", np.arange(7.0))
    default, zero, one = (bootstrap_draws([whole], 7, 5, *seed)["m"] for seed in ((), (0,), (1,)))
    assert default.tolist() == zero.tolist() != one.tolist()
    assert [round(7 * draw) for draw in default] == RECORDED
    many = bootstrap_draws([mean("m", np.arange(300.0))], 300, 3)["m"]
    assert [round(300 * draw) for draw in many] == RECORDED_OF_300
    assert next(draw_weights(3, 2, 0)).sum(axis=1).tolist() == [3, 3]
