import itertools

import numpy as np
import pytest
from tournaments import comparisons, tournament

from offbook.rating.bradley_terry import Tournament
from offbook.rating.sensitivity import raters_that_flip, votes_that_flip


def difference(data, keep, better, worse):
    rest = comparisons(data.left[keep], data.right[keep], data.outcome[keep], len(data.systems))
    theta = Tournament(rest).fit.params
    return theta[better] - theta[worse]


def fewest(data, groups, better, worse):
    """The smallest number of groups that turns an order, by trying all choices; None for more than 3."""
    names = sorted(set(groups))
    for count in range(1, 4):
        for gone in itertools.combinations(names, count):
            if difference(data, ~np.isin(groups, gone), better, worse) < 0:
                return count
    return None


@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_raters_is_the_smallest_that_turns_the_order(seed):
    _, data = tournament(seed, systems=3, n=60)
    fit, raters = Tournament(data).fit, np.random.default_rng(seed).integers(6, size=60)
    raters[:6] = np.arange(6)
    better, middle, worse = np.argsort(-fit.params[:3])
    eye = np.eye(len(fit.params))
    contrasts = np.stack([eye[better] - eye[middle], eye[middle] - eye[worse], eye[better] - eye[worse]])
    found = raters_that_flip(fit, contrasts, raters)
    pairs = [(better, middle), (middle, worse), (better, worse)]
    for ours, (high, low) in zip(found, pairs, strict=True):
        best = fewest(data, raters, high, low)
        # Ours takes raters in the order of their influence: never fewer than needed, and hardly ever more.
        assert ours is None or (best or 4) <= ours <= (best or 6) + 1
        assert ours is not None or best is None


def test_the_number_of_votes_turns_the_order_and_one_less_does_not():
    _, data = tournament(11, systems=4, n=400)
    fit = Tournament(data).fit
    order = np.argsort(-fit.params[:4])
    eye = np.eye(len(fit.params))
    contrasts = np.stack([eye[a] - eye[b] for a, b in itertools.pairwise(order)])
    found = votes_that_flip(fit, contrasts)
    assert all(number is not None for number in found)
    for number, (a, b), contrast in zip(found, itertools.pairwise(order), contrasts, strict=True):
        influence = (fit.tournament.scores(fit.params) @ (fit.inverse @ contrast))[fit.tournament.triple]
        ranked = np.argsort(-influence, kind="stable")
        keep = np.ones(400, bool)
        keep[ranked[: number - 1]] = False
        assert difference(data, keep, a, b) > -1e-3
        keep[ranked[number - 1]] = False
        assert difference(data, keep, a, b) < 1e-3


def test_an_order_that_nobody_can_turn():
    # Never beaten: without any of these votes there is a tie, not another order.
    data = comparisons([0, 1] * 10, [1, 0] * 10, [0, 1] * 10)
    fit = Tournament(data).fit
    contrast = np.array([[1.0, -1.0, 0.0, 0.0]])
    assert votes_that_flip(fit, contrast) == [None]
    assert raters_that_flip(fit, contrast, np.arange(20) % 3) == [None]


def test_a_narrow_order_hangs_on_one_vote():
    data = comparisons([0, 1] * 10 + [0], [1, 0] * 10 + [1], [0, 0] * 10 + [0])
    assert votes_that_flip(Tournament(data).fit, np.array([[1.0, -1.0, 0.0, 0.0]]))[0] <= 2
