import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize
from scipy.special import stdtrit
from tournaments import chances, comparisons, draw, random_pairs, tournament

from offbook.evaluate.stats import wilson
from offbook.rating.bradley_terry import Tournament
from offbook.rating.intervals import clustered_share, rank_intervals, uncertainty


def widths(fit, raters, items, **settings):
    return uncertainty(fit, np.asarray(raters), np.asarray(items), **settings).half_widths(fit.contrasts())


def model_widths(fit, degrees):
    contrasts = fit.contrasts()
    return stdtrit(degrees, 0.975) * np.sqrt(np.einsum("rp,pq,rq->r", contrasts, fit.inverse, contrasts))


def test_independent_votes_have_the_intervals_of_the_model():
    _, data = tournament(0, systems=5, n=6000)
    fit = Tournament(data).fit
    alone = np.arange(6000)
    np.testing.assert_allclose(widths(fit, alone, alone), model_widths(fit, 5999), rtol=0.08)
    # Few raters, among whom nothing differs: the bootstrap finds the same, up to its own noise.
    found = widths(fit, np.arange(6000) % 15, alone, resamples=400)
    np.testing.assert_allclose(found / model_widths(fit, 14), 1, atol=0.5)
    assert np.mean(found) == pytest.approx(np.mean(model_widths(fit, 14)), rel=0.25)


def test_the_sandwich_is_the_formula():
    _, data = tournament(3, systems=3, n=90)
    rng = np.random.default_rng(0)
    raters, items = rng.permutation(np.arange(90) % 25), rng.permutation(np.arange(90) % 22)
    fit = Tournament(data).fit

    def log_likelihood(params, n):
        d = params[data.left[n]] - params[data.right[n]] + params[3]
        return np.log(chances(np.array([d]), np.exp(params[4]))[0, data.outcome[n]])

    scores = np.array([approx_fprime(fit.params, log_likelihood, 1e-6, n) for n in range(90)])
    meat = np.diag(fit.tournament.precision)
    pairs = list(zip(raters, items, strict=True))
    for labels, sign in ((list(raters), 1), (list(items), 1), (pairs, -1)):
        groups = sorted(set(labels))
        sums = [sum(scores[n] for n in range(90) if labels[n] == group) for group in groups]
        meat = meat + sign * len(groups) / (len(groups) - 1) * sum(np.outer(each, each) for each in sums)
    covariance = fit.inverse @ meat @ fit.inverse
    assert np.linalg.eigvalsh(covariance).min() > 0
    contrasts = fit.contrasts()
    expected = stdtrit(21, 0.975) * np.sqrt(np.einsum("rp,pq,rq->r", contrasts, covariance, contrasts))
    np.testing.assert_allclose(widths(fit, raters, items), expected, rtol=1e-4)


def test_votes_that_repeat_a_rater_or_an_item_add_nothing():
    _, data = tournament(1, systems=4, n=1500)
    copies = [np.repeat(of, 4) for of in (data.left, data.right, data.outcome)]
    one, four = Tournament(data).fit, Tournament(comparisons(*copies)).fit
    alone, copied = np.arange(1500), np.repeat(np.arange(1500), 4)
    own = np.arange(6000)
    expected = widths(one, alone, alone)
    np.testing.assert_allclose(widths(four, copied, own), expected, rtol=0.05)
    np.testing.assert_allclose(widths(four, own, copied), expected, rtol=0.05)
    np.testing.assert_allclose(widths(four, own, own), expected / 2, rtol=0.05)
    # Among few raters as well, the items tell.
    assert widths(four, own % 19, copied, resamples=200).min() > 0.8 * expected.min()


def test_with_one_rater_items_are_resampled_and_with_one_item_raters():
    _, data = tournament(2, systems=4, n=800)
    fit, one, many = Tournament(data).fit, np.zeros(800, int), np.arange(800) % 40
    assert uncertainty(fit, one, many).method == "bootstrap over 40 items 0.95"
    assert uncertainty(fit, many, one).method == "bootstrap over 40 raters 0.95"
    widest = "widest of bootstrap over 5 raters, bootstrap over 40 items and their sum 0.95"
    assert uncertainty(fit, many % 5, many).method == widest
    assert uncertainty(fit, many, many).method == "sandwich clustered by rater and item 0.95"
    nothing = uncertainty(fit, one, one)
    assert np.isinf(nothing.half_widths(fit.contrasts())).all()
    assert nothing.p_value(1.0, fit.contrasts()[0]) is None
    np.testing.assert_array_equal(widths(fit, one, many, seed=3), widths(fit, one, many, seed=3))


@pytest.mark.parametrize("raters", [30, 5])
def test_a_system_without_losses_has_a_finite_rating_and_a_wide_interval(raters):
    _, data = tournament(5, systems=4, n=600)
    rng = np.random.default_rng(0)
    other = rng.integers(4, size=12)
    left, right = np.append(data.left, [4] * 12), np.append(data.right, other)
    fit = Tournament(comparisons(left, right, np.append(data.outcome, [0] * 12))).fit
    n = np.arange(612)
    found = widths(fit, n % raters, n % 50)
    theta = fit.contrasts() @ fit.params
    assert theta.argmax() == 4
    assert 0.5 < found[4] < 8
    assert found[4] > 3 * found[:4].max()


def test_the_left_side_is_tested():
    for gamma, unlikely in ((0.0, False), (0.6, True)):
        _, data = tournament(7, systems=4, n=1200, gamma=gamma)
        fit, n = Tournament(data).fit, np.arange(1200)
        contrast = np.eye(len(fit.params))[fit.tournament.gamma]
        p = uncertainty(fit, n % 30, n % 40).p_value(fit.params[fit.tournament.gamma], contrast)
        assert (p < 1e-4) == unlikely


def test_rank_intervals_count_who_is_surely_better_and_worse():
    values, half = np.array([0.5, 1.0, 2.5, -8.5, 0.0]), np.full((5, 5), 1.0)
    half[4] = half[:, 4] = np.inf
    assert rank_intervals(values, half) == [(2, 4), (2, 4), (1, 2), (4, 5), (1, 5)]
    # Two that share most of what is not known of them are told apart.
    half[0, 1] = half[1, 0] = 0.4
    assert rank_intervals(values, half) == [(3, 4), (2, 3), (1, 2), (4, 5), (1, 5)]


def test_what_raters_and_what_items_share_adds_up_though_they_are_few():
    theta, n = np.array([0.8, 0.3, 0.0, -0.3, -0.8]), 1200
    data, rater, item = study(np.random.default_rng(0), theta, 12, 12, n, 0.8, 0.8)
    fit = Tournament(data).fit
    found = uncertainty(fit, rater, item, resamples=200)
    of_raters, of_items, both = (spread.error(fit.contrasts()) for spread in found.spreads)
    assert (both > 1.1 * np.maximum(of_raters, of_items)).mean() > 0.5
    np.testing.assert_allclose(
        found.half_widths(fit.contrasts()), np.max([of_raters, of_items, both], 0) * stdtrit(11, 0.975)
    )
    alone = fit.contrasts()[:, None] - fit.contrasts()
    expected = found.half_widths(alone.reshape(25, -1)).reshape(5, 5)
    np.testing.assert_allclose(found.half_widths_between(fit.contrasts()), expected, atol=1e-6)


def test_shares_of_few_raters_on_few_items_hold_the_truth():
    rng, held = np.random.default_rng(0), []
    raters, items = (each.ravel() for each in np.indices((19, 19)))
    for _ in range(400):
        strength = rng.normal(size=19)[raters] + rng.normal(size=19)[items] + rng.normal(size=361)
        found = clustered_share(strength > 0, raters, items)
        held.append(found.low <= 0.5 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98


def test_a_share_of_independent_votes_is_wilsons():
    for hits in (37, 400):
        n = np.arange(500)
        ours, plain = clustered_share(n < hits, n, n), wilson(hits, 500)
        assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high), abs=1e-3)
    n = np.arange(100)
    assert clustered_share(n >= 0, n, n).low == pytest.approx(wilson(100, 100).low)


def test_a_share_counts_clusters_not_votes():
    rng = np.random.default_rng(0)
    once, n = rng.random(60) < 0.3, np.arange(60)
    plain = clustered_share(once, n, n)
    many, own = np.repeat(once, 10), np.arange(600)
    for raters, items in ((np.repeat(n, 10), own), (own, np.repeat(n, 10))):
        found = clustered_share(many, raters, items)
        assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    # 500 equal answers of 5 raters are 5 opinions.
    equal = clustered_share(np.ones(500, bool), np.arange(500) % 5, np.arange(500))
    assert (equal.value, equal.high) == (1, 1)
    assert equal.low == pytest.approx(wilson(5, 5).low)
    unknown = clustered_share(np.array([True, False]), np.zeros(2, int), np.zeros(2, int))
    assert (unknown.value, unknown.low, unknown.high) == (0.5, -math.inf, math.inf)


def study(rng, theta, raters, items, n, taste, difficulty):
    """Votes of raters with tastes of their own on items that suit some systems: (comparisons, raters, items)."""
    rater, item = rng.integers(raters, size=n), rng.integers(items, size=n)
    rater[:raters], item[:items] = np.arange(raters), np.arange(items)
    left, right = random_pairs(rng, len(theta), n)
    own = theta + taste * rng.normal(size=(raters, len(theta)))[rater]
    own = own + difficulty * rng.normal(size=(items, len(theta)))[item]
    at = np.arange(n)
    return comparisons(left, right, draw(rng, own[at, left] - own[at, right] + 0.2, 0.4), len(theta)), rater, item


def population(theta, taste, difficulty):
    """The ratings that endless votes of endless raters on endless items would have; theta is what single ones have."""
    rng = np.random.default_rng(0)
    pairs = [(i, j) for i in range(len(theta)) for j in range(len(theta)) if i != j]
    noise = math.sqrt(2 * (taste**2 + difficulty**2)) * rng.normal(size=20_000)
    expected = np.array([chances(theta[i] - theta[j] + 0.2 + noise, 0.4).mean(axis=0) for i, j in pairs])
    left, right = np.array(pairs).T

    def loss(params):
        d = params[left] - params[right] + params[-2]
        return -(expected * np.log(chances(d, np.exp(params[-1])))).sum() + params[:-2].sum() ** 2

    return minimize(loss, np.zeros(len(theta) + 2), method="BFGS").x[:-2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raters", "items", "n", "taste", "difficulty"),
    [
        (40, 60, 1200, 0.0, 0.0),
        (40, 60, 1200, 0.4, 0.4),
        (8, 60, 600, 0.4, 0.0),
        (19, 19, 7220, 0.8, 0.8),
        (1, 40, 400, 0.0, 0.4),
    ],
    ids=["independent", "clustered two ways", "few raters", "few of both", "one rater"],
)
def test_intervals_of_500_tournaments_cover_the_truth(raters, items, n, taste, difficulty):
    theta = np.array([0.8, 0.3, 0.0, -0.3, -0.8])
    truth = population(theta, taste, difficulty)
    held = []
    for seed in range(500):
        data, rater, item = study(np.random.default_rng(seed), theta, raters, items, n, taste, difficulty)
        fit = Tournament(data).fit
        half = widths(fit, rater, item, seed=seed, resamples=200)
        held.append(np.abs(fit.contrasts() @ fit.params - truth) <= half)
    coverage = float(np.mean(held))
    print(f"coverage {coverage:.3f}")
    assert 0.90 <= coverage <= 0.98
