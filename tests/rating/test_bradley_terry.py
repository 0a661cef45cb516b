import time

import numpy as np
import pytest
from tournaments import comparisons, reference, tournament

from offbook.rating.bradley_terry import Tournament, normalised_difference


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_that_of_a_general_optimiser(seed):
    beta = () if seed < 3 else (0.8, -0.4)
    _, data = tournament(seed, systems=4 + seed, n=400, beta=beta)
    np.testing.assert_allclose(Tournament(data).fit.params, reference(data), atol=2e-5)


def test_the_terms_are_recovered():
    truth, data = tournament(0, systems=5, n=40_000, gamma=0.5, nu=0.7, beta=(-1.0,))
    np.testing.assert_allclose(Tournament(data).fit.params, truth, atol=0.08)


def test_the_curvature_is_the_slope_of_the_slope():
    _, data = tournament(1, systems=4, n=300, beta=(0.5,))
    field = Tournament(data)
    at = np.linspace(-0.8, 0.7, len(field.precision))
    slope = field.slope(field.weights[:, None], np.zeros((len(at), 1)))
    steps = 1e-5 * np.eye(len(at))
    numeric = [(slope((at - step)[:, None]) - slope((at + step)[:, None]))[:, 0] / 2e-5 for step in steps]
    np.testing.assert_allclose(field.information(at, field.weights), numeric, atol=1e-5)
    # The scores of single votes add up to the slope without the prior.
    total = field.scores(at).T @ field.weights
    np.testing.assert_allclose(total, slope(at[:, None])[:, 0] + field.precision * at, atol=1e-9)


def test_a_refit_is_the_fit_of_what_is_left():
    _, data = tournament(2, systems=6, n=500, beta=(0.6,))
    field = Tournament(data)
    rng = np.random.default_rng(0)
    keep = rng.random((70, 500)) < rng.uniform(0.05, 1, (70, 1))
    counts = np.stack([np.bincount(field.triple[row], minlength=len(field.weights)) for row in keep], axis=1)
    params = field.refit(lambda rows: counts[:, rows].astype(float), 70)
    for i in (0, 33, 69):
        left, right, outcome, style = (of[keep[i]] for of in (data.left, data.right, data.outcome, data.style))
        alone = Tournament(comparisons(left, right, outcome, 6, style)).fit.params
        np.testing.assert_allclose(params[:, i], alone, atol=1e-3)


def test_nothing_makes_a_rating_infinite():
    many = 20_000
    cases = {
        "one vote": comparisons([0], [1], [0]),
        "never beaten": comparisons([0, 1] * many, [1, 0] * many, [0, 1] * many),
        "always left": comparisons([0, 1] * many, [1, 0] * many, [0, 0] * many),
        "always tied": comparisons([0, 1] * many, [1, 0] * many, [2, 2] * many),
        "told by style": comparisons([0, 1] * many, [1, 0] * many, [0, 1] * many, 2, [1.0, -1.0] * many),
        "no style": comparisons([0, 1] * many, [1, 0] * many, [0, 1] * many, 2, [0.0, 0.0] * many),
    }
    fits = {name: Tournament(data).fit for name, data in cases.items()}
    for name, fit in fits.items():
        assert np.isfinite(fit.params).all(), name
        assert np.abs(fit.params[:2]).max() < 8, name
        assert fit.params[0] == pytest.approx(-fit.params[1], abs=1e-6), name
    assert fits["never beaten"].params[0] > 4
    assert fits["always left"].params[:2] == pytest.approx([0, 0], abs=1e-6)
    assert fits["always tied"].params[:2] == pytest.approx([0, 0], abs=1e-6)


def test_parts_that_no_comparison_links_have_a_zero_of_their_own():
    data = comparisons([0, 1, 0, 3, 4], [1, 2, 2, 4, 3], [0, 0, 0, 1, 0])
    field = Tournament(data)
    assert field.components[0] == field.components[1] == field.components[2]
    assert field.components[3] == field.components[4] != field.components[0]
    theta = field.fit.contrasts() @ field.fit.params
    assert theta[:3].sum() == pytest.approx(0, abs=1e-9)
    assert theta[3:].sum() == pytest.approx(0, abs=1e-9)
    anchored = field.fit.contrasts("s001") @ field.fit.params
    np.testing.assert_allclose(anchored[:3], theta[:3] - theta[1])
    np.testing.assert_allclose(anchored[3:], theta[3:])


def test_differences_of_features_have_no_unit_and_no_pole():
    pairs = ((3.0, 1.0), (1.0, 3.0), (0.0, 0.0), (0.0, 5.0), (-2.0, 2.0))
    assert [normalised_difference(a, b) for a, b in pairs] == [0.5, -0.5, 0, -1, -1]


def test_a_large_tournament_is_fitted_within_a_second():
    _, data = tournament(0, systems=100, n=100_000)
    began = time.process_time()
    fit = Tournament(data).fit
    assert time.process_time() - began < 1
    assert np.isfinite(fit.params).all()


@pytest.mark.slow
def test_a_thousand_refits_take_ten_seconds_at_most():
    _, data = tournament(0, systems=200, n=20_000)
    field, rng = Tournament(data), np.random.default_rng(0)
    counts = field.counts(rng.integers(15, size=20_000)).T.tocsr()
    drawn = rng.multinomial(15, np.full(15, 1 / 15), size=1000).astype(float)
    began = time.process_time()
    params = field.refit(lambda rows: counts @ drawn[rows].T, 1000)
    # Processor time of all threads, so that a busy machine tells the same.
    assert time.process_time() - began < 10
    assert np.isfinite(params).all()
