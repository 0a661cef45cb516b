"""How few votes, or raters, an order of two systems hangs on.

The influence of a vote on the difference of two ratings is known from one fit. Votes are removed from the one with most
influence on; the fit that is left tells whether the order has turned. No smaller number of the votes with most
influence does it; another choice might, so that the number is an upper bound.

Source: the question is that of Huang et al., "Dropping Just a Handful of Preferences Can Change Top Large Language
Model Rankings" (2025).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from offbook.errors import needs_extra
from offbook.rating.bradley_terry import Fit

with needs_extra("arena"):
    from scipy import sparse

_EQUAL = 1e-5


def votes_that_flip(fit: Fit, contrasts: Float64[np.ndarray, "q p"]) -> list[int | None]:
    """For each positive difference, at most how many votes have to go to make it negative; None where none suffice.

    Args:
        fit: of all votes.
        contrasts: by which the parameters give q differences.
    """
    weights = fit.tournament.weights
    return _fewest(fit, contrasts, sparse.identity(len(weights), format="csr"), weights)


def raters_that_flip(
    fit: Fit, contrasts: Float64[np.ndarray, "q p"], raters: Int64[np.ndarray, " n"]
) -> list[int | None]:
    """The same for raters with all their votes.

    Args:
        fit: of all n votes.
        contrasts: by which the parameters give q differences.
        raters: number of the rater of each vote, from 0 without gaps.
    """
    units = fit.tournament.counts(raters)
    return _fewest(fit, contrasts, units, np.ones(units.shape[0]))


def _fewest(fit: Fit, contrasts: np.ndarray, units: Any, copies: np.ndarray) -> list[int | None]:
    """The smallest number of units from the one with most influence on whose removal turns each difference.

    Args:
        fit: of all votes.
        contrasts: of the differences, shape (q, p).
        units: votes of each triple in one unit, sparse (u, t).
        copies: how many equal ones there are of each unit, shape (u,).
    """
    tournament = fit.tournament
    influence = units @ (tournament.scores(fit.params) @ (fit.inverse @ contrasts.T))
    order = np.argsort(-influence, axis=0, kind="stable")
    before = np.cumsum(copies[order], axis=0) - copies[order]
    most = (copies[:, None] * (influence > 0)).sum(axis=0).astype(np.int64)

    def turned(chosen: np.ndarray, removed: np.ndarray) -> np.ndarray:
        def weights(rows: slice) -> np.ndarray:
            which = chosen[rows]
            taken = np.zeros((len(copies), len(which)))
            part = np.clip(removed[rows] - before[:, which], 0, copies[order[:, which]])
            np.put_along_axis(taken, order[:, which], part, axis=0)
            return np.asarray(tournament.weights[:, None] - units.T @ taken)

        params = tournament.refit(weights, len(chosen), exact=True)
        # Without any vote that tells them apart two systems are equal but for rounding, and that is no other order.
        return np.asarray((contrasts[chosen] * params.T).sum(axis=1) < -_EQUAL)

    # The answer is above `low` and, once one number is known to suffice, at most `high`.
    low, high = np.zeros_like(most), most + 1
    probe = np.clip(_predicted(influence, order, copies, contrasts @ fit.params), 1, np.maximum(most, 1))
    while len(chosen := np.flatnonzero(low + 1 < high)):
        flipped = turned(chosen, probe[chosen])
        high[chosen[flipped]] = probe[chosen[flipped]]
        low[chosen[~flipped]] = probe[chosen[~flipped]]
        # Near the prediction first: it is seldom far off.
        middle = np.where(low == 0, 0.8 * high, np.where(high > most, 1.25 * low + 1, (low + high) / 2))
        probe = np.clip(middle.astype(np.int64), low + 1, np.maximum(high - 1, low + 1))
    return [int(number) if number <= limit else None for number, limit in zip(high, most, strict=True)]


def _predicted(influence: np.ndarray, order: np.ndarray, copies: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """How many units should do, were influences to add up."""
    each = np.take_along_axis(influence, order, axis=0)
    gains = np.cumsum(each * copies[order], axis=0)
    last = np.minimum((gains < differences).sum(axis=0), len(copies) - 1)[None]
    reach, one, many = (np.take_along_axis(of, last, axis=0)[0] for of in (gains, each, copies[order]))
    through = np.take_along_axis(np.cumsum(copies[order], axis=0), last, axis=0)[0]
    surplus = np.divide(reach - differences, one, out=np.zeros_like(one), where=one > 0)
    return np.asarray((through - np.clip(np.floor(surplus), 0, many - 1)).astype(np.int64))
