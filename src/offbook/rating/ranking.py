"""A ranking of systems from votes: ratings with intervals, ranks, and what each place in the order hangs on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from offbook.evaluate.stats import Interval
from offbook.rating.bradley_terry import Comparisons, Fit, Tournament
from offbook.rating.intervals import RESAMPLES, Uncertainty, rank_intervals, uncertainty
from offbook.rating.records import Vote
from offbook.rating.sensitivity import raters_that_flip, votes_that_flip


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One system of a ranking.

    Attributes:
        system: its name.
        component: number of the group of systems that comparisons link, from 1, the largest first; there is no order
            between components.
        votes: in which it was compared.
        wins: of them.
        ties: of them, those that call both bad left out.
        both_bad: of them; ties to the model.
        losses: of them.
        theta: strength in log-odds: among two that are 1 apart and do not tie, the better one wins e times as often.
        rank: by theta among its component, from 1.
        ranks: the best and the worst rank that the intervals of its differences to the others leave open.
    """

    system: str
    component: int
    votes: int
    wins: int
    ties: int
    both_bad: int
    losses: int
    theta: Interval
    rank: int
    ranks: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Two systems that are next to each other in the order of a component.

    Attributes:
        better: the one with the higher theta.
        worse: the other.
        difference: of their thetas.
        votes: the order turns when these many votes are left out; None where it does not.
        raters: the same for raters with all their votes.
    """

    better: str
    worse: str
    difference: Interval
    votes: int | None
    raters: int | None


@dataclass(frozen=True, kw_only=True)
class Term:
    """A regressor.

    Attributes:
        name: `left` for what standing on the left adds, or a feature.
        value: in log-odds; of a feature for the largest normalised difference, 1.
        p_value: of having no effect; None where nothing is known.
    """

    name: str
    value: Interval
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What votes say of the systems.

    Attributes:
        ratings: by component, the strongest first.
        steps: between neighbours in that order.
        left: what standing on the left adds.
        style: the features that were controlled for.
        nu: Davidson's: among equal systems, ties per decision.
        anchor: whose theta is 0, in its component; elsewhere, and without one, the mean is.
        votes: number of votes behind it.
        raters: number of raters.
        items: number of items, or clusters of them.
        method: how the intervals were found.
    """

    ratings: tuple[Rating, ...]
    steps: tuple[Step, ...]
    left: Term
    style: tuple[Term, ...]
    nu: float
    anchor: str | None
    votes: int
    raters: int
    items: int
    method: str


def rank(
    votes: Sequence[Vote],
    *,
    anchor: str | None = None,
    features: Sequence[str] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ranking | None:
    """Ranks systems by the votes on real pairs; None where there are none.

    Args:
        votes: all that are to count, of one kind of raters; skips are passed over.
        anchor: a system whose theta is 0.
        features: to control for.
        seed: of resampling.
        resamples: how often clusters are resampled where there are few.
    """
    used = [vote for vote in votes if vote.pair_kind == "real" and vote.choice != "skip"]
    if not used:
        return None
    fit = Tournament(Comparisons.of(used, features)).fit
    raters, items = (numbered([getattr(vote, name) for vote in used]) for name in ("rater", "group"))
    unsure = uncertainty(fit, raters, items, seed=seed, resamples=resamples)
    tournament, size = fit.tournament, len(fit.params)
    terms = [
        _term(name, fit, unsure, place)
        for name, place in (("left", tournament.gamma), *zip(features, range(tournament.log_nu + 1, size), strict=True))
    ]
    contrasts = fit.contrasts(anchor)
    ratings = _ratings(used, fit, contrasts, unsure)
    return Ranking(
        ratings=ratings,
        steps=_steps(ratings, fit, contrasts, unsure, raters),
        left=terms[0],
        style=tuple(terms[1:]),
        nu=float(np.exp(fit.params[tournament.log_nu])),
        anchor=anchor if anchor in tournament.comparisons.systems else None,
        votes=len(used),
        raters=int(raters.max()) + 1,
        items=int(items.max()) + 1,
        method=unsure.method,
    )


def numbered(names: Sequence[str]) -> np.ndarray:
    """The number of each name among the distinct ones, from 0 without gaps."""
    return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.int64)


def _interval(value: float, half: float, n: int, unsure: Uncertainty) -> Interval:
    return Interval(value=float(value), low=float(value - half), high=float(value + half), n=n, method=unsure.method)


def _term(name: str, fit: Fit, unsure: Uncertainty, place: int) -> Term:
    contrast = np.eye(len(fit.params))[place]
    value, half = float(fit.params[place]), float(unsure.half_widths(contrast[None])[0])
    interval = _interval(value, half, len(fit.tournament.triple), unsure)
    return Term(name=name, value=interval, p_value=unsure.p_value(value, contrast))


def _ratings(
    votes: Sequence[Vote], fit: Fit, contrasts: Float64[np.ndarray, "systems p"], unsure: Uncertainty
) -> tuple[Rating, ...]:
    systems, components = fit.tournament.comparisons.systems, fit.tournament.components
    theta, half = contrasts @ fit.params, unsure.half_widths(contrasts)
    tally = _tally(votes)
    found: list[Rating] = []
    groups = sorted((np.flatnonzero(components == c) for c in np.unique(components)), key=lambda g: (-len(g), g[0]))
    for number, group in enumerate(groups, 1):
        between = unsure.half_widths_between(np.eye(len(systems), len(fit.params))[group])
        ranks = dict(zip(group, rank_intervals(fit.params[group], between), strict=True))
        for place, i in enumerate(sorted(group, key=lambda i: -theta[i]), 1):
            counts = tally[systems[i]]
            n = sum(counts.values())
            found.append(
                Rating(
                    system=systems[i],
                    component=number,
                    votes=n,
                    theta=_interval(theta[i], half[i], n, unsure),
                    rank=place,
                    ranks=ranks[i],
                    **counts,
                )
            )
    return tuple(found)


def _tally(votes: Sequence[Vote]) -> dict[str, dict[str, int]]:
    """How often each system won, tied, was called bad with the other, and lost."""
    found: dict[str, dict[str, int]] = {}
    for vote in votes:
        for system in (vote.left, vote.right):
            counts = found.setdefault(system, dict.fromkeys(("wins", "ties", "both_bad", "losses"), 0))
            if vote.winner is None:
                counts["ties" if vote.choice == "tie" else "both_bad"] += 1
            else:
                counts["wins" if vote.winner == system else "losses"] += 1
    return found


def _steps(
    ratings: Sequence[Rating],
    fit: Fit,
    contrasts: Float64[np.ndarray, "systems p"],
    unsure: Uncertainty,
    raters: np.ndarray,
) -> tuple[Step, ...]:
    place = {name: i for i, name in enumerate(fit.tournament.comparisons.systems)}
    pairs = [(a, b) for a, b in itertools.pairwise(ratings) if a.component == b.component]
    if not pairs:
        return ()
    rows = np.array([contrasts[place[a.system]] - contrasts[place[b.system]] for a, b in pairs])
    value, half = rows @ fit.params, unsure.half_widths(rows)
    flips = zip(votes_that_flip(fit, rows), raters_that_flip(fit, rows, raters), strict=True)
    return tuple(
        Step(
            better=a.system,
            worse=b.system,
            difference=_interval(value[i], half[i], len(raters), unsure),
            votes=by_votes,
            raters=by_raters,
        )
        for i, ((a, b), (by_votes, by_raters)) in enumerate(zip(pairs, flips, strict=True))
    )
