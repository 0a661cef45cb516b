import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import ConfigError
from offbook.evaluate import stats
from offbook.evaluate.claims import over_seeds, separation

counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize(
    ("ours", "method"), [(stats.wilson, "wilson"), (stats.clopper_pearson, "exact")], ids=["wilson", "exact"]
)
def test_success_intervals_agree_with_scipy(ours, method, count, level):
    successes, n = count
    interval = ours(successes, n, level=level)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(level, method=method)
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.n == n


def test_exact_interval_of_many_trials():
    theirs = scipy.stats.binomtest(4_321, 10_000).proportion_ci(0.95, method="exact")
    ours = stats.clopper_pearson(4_321, 10_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-8)


@given(st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_mcnemar_agrees_with_the_binomial_test(b, c):
    expected = scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert stats.mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)
    assert stats.mcnemar_exact(b, c) == stats.mcnemar_exact(c, b)


def test_bootstrap_mean_agrees_with_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=80)
    ours = stats.bootstrap_mean(values, seed=1, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_iqm_is_the_trimmed_mean(values):
    assert stats.iqm(values, resamples=10).value == pytest.approx(scipy.stats.trim_mean(values, 0.25), abs=1e-9)


def test_iqm_resamples_within_tasks():
    # Two tasks on scales that never mix: if rows were drawn across tasks, the interval would span both.
    scores = np.stack([np.zeros(8), np.full(8, 100.0)], axis=1)
    interval = stats.iqm(scores)
    assert (interval.value, interval.low, interval.high) == (50.0, 50.0, 50.0)


def test_same_seed_same_interval_other_seed_other():
    values = np.random.default_rng(0).normal(size=30)
    assert stats.bootstrap_mean(values, seed=5) == stats.bootstrap_mean(values, seed=5)
    assert stats.bootstrap_mean(values, seed=5) != stats.bootstrap_mean(values, seed=6)


def test_blocks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = stats.bootstrap_mean(values, seed=5, resamples=500)
    monkeypatch.setattr(stats, "_BLOCK", 100)
    assert stats.bootstrap_mean(values, seed=5, resamples=500) == whole


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    scene = rng.normal(scale=10, size=40)
    better, worse = scene + 1 + rng.normal(scale=0.1, size=40), scene + rng.normal(scale=0.1, size=40)
    interval = stats.paired_bootstrap(better, worse)
    assert 0.9 < interval.low < interval.high < 1.1
    assert interval.n == 40


def test_unpaired_differences_know_nothing_of_pairs():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=40)
    first, second = shared + 0.5 + 0.1 * rng.normal(size=40), shared
    paired, apart = (of(first, second) for of in (stats.paired_bootstrap, stats.unpaired_bootstrap))
    assert apart.value == pytest.approx(paired.value)
    assert apart.n == 40
    # The error of a difference of two means, by the normal law.
    width = 2 * 2.0 * np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 40)
    assert apart.high - apart.low == pytest.approx(width, rel=0.1)
    assert paired.high - paired.low < 0.2 * width
    with pytest.raises(ConfigError, match="40 and 39"):
        stats.unpaired_bootstrap(first, second[1:])


def test_one_seed_separates_nothing():
    assert separation(over_seeds("gain", [1.0])) == "not separated"
    assert separation(over_seeds("gain", [-1.0, -1.1, -0.9])) == "contradicted"


def test_bootstrap_covers_near_its_level():
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        interval = stats.bootstrap_mean(rng.normal(size=50), seed=trial, resamples=500)
        hits += interval.low <= 0 <= interval.high
    assert 0.89 <= hits / 300 <= 0.98


def test_one_episode_has_no_interval():
    interval = stats.bootstrap_mean([3.0])
    assert interval.value == 3.0
    assert interval.to_json()["low"] is None
    assert "unknown" in str(interval)
    assert math.isinf(interval.high)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.wilson(3, 2),
        lambda: stats.clopper_pearson(0, 0),
        lambda: stats.wilson(1, 2, level=1.5),
        lambda: stats.mcnemar_exact(-1, 2),
        lambda: stats.bootstrap_mean([]),
        lambda: stats.bootstrap_mean([1.0, float("nan")]),
        lambda: stats.paired_bootstrap([1.0], [1.0, 2.0]),
        lambda: stats.iqm(np.zeros((2, 2, 2))),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize("n", [6, 10, 40])
def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says(n):
    rng = np.random.default_rng(0)
    intervals = [stats.bootstrap_mean(rng.normal(size=n), seed=i, resamples=1_000) for i in range(300)]
    # 95 % are promised; 300 draws of a bootstrap from few observations stay within a few percent of it.
    assert np.mean([interval.low <= 0 <= interval.high for interval in intervals]) >= 0.91


@pytest.mark.parametrize("n", [2, 5])
def test_too_few_observations_have_no_interval(n):
    interval = stats.bootstrap_mean(np.arange(n) + 1.0)
    assert (interval.low, interval.high, interval.n) == (-np.inf, np.inf, n)


SCORES = {
    "binary": lambda rng, n: (rng.binomial(1, 0.9, n).astype(float), 0.9),
    "rare": lambda rng, n: (rng.binomial(1, 0.05, n).astype(float), 0.05),
    "all one": lambda rng, n: (np.ones(n), 1.0),
    "all the same": lambda rng, n: (np.full(n, 0.4), 0.4),
    "most in the bowl": lambda rng, n: (rng.beta(4.0, 0.4, n), 4.0 / 4.4),
    "all or nothing": lambda rng, n: (rng.beta(0.2, 0.3, n), 0.4),
    "around the middle": lambda rng, n: (rng.beta(3.0, 3.0, n), 0.5),
}


@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize("name", SCORES)
def test_the_interval_of_a_bounded_mean_covers_the_truth(name, n):
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        values, truth = SCORES[name](rng, n)
        interval = stats.bounded_mean(values, 0.0, 1.0, seed=trial, resamples=300)
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        assert interval.high > interval.low
        covered += interval.low <= truth <= interval.high
    assert covered / 200 >= 0.93


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (37, 40), (1, 1)])
def test_of_ones_and_zeros_the_bounded_mean_is_clopper_and_pearsons(successes, n):
    exact = stats.clopper_pearson(successes, n)
    ours = stats.bounded_mean([1.0] * successes + [0.0] * (n - successes), 0.0, 1.0, resamples=40_000)
    assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high), abs=0.01)
    # Any other range is the same interval, moved and stretched.
    scaled = stats.bounded_mean([10.0] * successes + [-30.0] * (n - successes), -30.0, 10.0, resamples=40_000)
    assert (scaled.low, scaled.high) == pytest.approx((40 * ours.low - 30, 40 * ours.high - 30))


@pytest.mark.parametrize(("values", "low", "high"), [([], 0, 1), ([1.1], 0, 1), ([np.nan], 0, 1), ([1.0], 1, 1)])
def test_scores_outside_their_range_are_refused(values, low, high):
    with pytest.raises(ConfigError):
        stats.bounded_mean(values, float(low), float(high))
