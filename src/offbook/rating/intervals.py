"""How sure ratings and shares are when votes of one rater, and votes on one item, resemble each other.

With 20 raters and 20 items or more, the sandwich estimator clustered two ways: what the votes of a rater have in common
adds to the variance, so does what those on an item have in common, and what both count is taken off once. With fewer
of either it is too short; then whole raters are resampled, and whole items, and the widest interval holds: of the two,
and of the sum of both variances, less that of votes that nothing links, which both count. Where there is one rater,
only items are resampled, and the interval speaks for that rater.

The prior counts as one more observation, so that a system of few votes, or without losses, has a wide interval.

Source: Cameron, Gelbach and Miller, "Robust Inference With Multiway Clustering" (2011), section 2; a normal quantile is
replaced by Student's with one degree of freedom less than there are clusters, as in Cameron and Miller, "A
Practitioner's Guide to Cluster-Robust Inference" (2015), section VI.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float64, Int64

from offbook.errors import needs_extra
from offbook.evaluate.stats import Interval
from offbook.rating.bradley_terry import Fit

with needs_extra("arena"):
    from scipy.special import stdtr, stdtrit

FEW = 20
LEVEL = 0.95
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """One estimate of how the parameters of a fit would vary.

    Attributes:
        covariance: of the parameters.
        clusters: number of independent groups of votes behind it.
        method: how it was found.
    """

    covariance: Float64[np.ndarray, "p p"]
    clusters: int
    method: str

    def error(self, contrasts: Float64[np.ndarray, "rows p"]) -> Float64[np.ndarray, " rows"]:
        """The standard error of each contrast."""
        variance = np.einsum("rp,pq,rq->r", contrasts, self.covariance, contrasts, optimize=True)
        return np.asarray(np.sqrt(np.maximum(variance, 0)))

    def error_between(self, contrasts: Float64[np.ndarray, "rows p"]) -> Float64[np.ndarray, "rows rows"]:
        """The standard error of the difference of each two contrasts."""
        shared = contrasts @ self.covariance @ contrasts.T
        own = np.diag(shared)
        return np.asarray(np.sqrt(np.maximum(own[:, None] + own - 2 * shared, 0)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Uncertainty:
    """All that is known of how sure a fit is.

    Attributes:
        spreads: estimates of which the widest holds; none where all votes are of one rater about one item.
    """

    spreads: tuple[Spread, ...]

    @property
    def method(self) -> str:
        """How the intervals are found, in words."""
        if not self.spreads:
            return "one rater and one item: no interval"
        *most, last = (spread.method for spread in self.spreads)
        words = f"widest of {', '.join(most)} and {last}" if most else last
        return f"{words} {LEVEL:g}"

    def half_widths(self, contrasts: Float64[np.ndarray, "rows p"]) -> Float64[np.ndarray, " rows"]:
        """How far the interval of each contrast reaches to either side; infinite where nothing is known."""
        if not self.spreads:
            return np.full(len(contrasts), np.inf)
        widths = [quantile(spread.clusters) * spread.error(contrasts) for spread in self.spreads]
        return np.asarray(np.max(widths, axis=0))

    def half_widths_between(self, contrasts: Float64[np.ndarray, "rows p"]) -> Float64[np.ndarray, "rows rows"]:
        """The same for the difference of each two contrasts."""
        if not self.spreads:
            return np.full((len(contrasts), len(contrasts)), np.inf)
        widths = [quantile(spread.clusters) * spread.error_between(contrasts) for spread in self.spreads]
        return np.asarray(np.max(widths, axis=0))

    def p_value(self, value: float, contrast: Float64[np.ndarray, " p"]) -> float | None:
        """Of the hypothesis that a contrast is 0, two-sided; None where nothing is known."""
        errors = [(float(spread.error(contrast[None])[0]), spread.clusters - 1) for spread in self.spreads]
        chances = [2 * float(stdtr(degrees, -abs(value) / error)) for error, degrees in errors if error > 0]
        return max(chances, default=None)


def quantile(clusters: int) -> float:
    """How many standard errors an interval of `LEVEL` reaches to either side, by Student's distribution."""
    return float(stdtrit(clusters - 1, (1 + LEVEL) / 2))


def uncertainty(
    fit: Fit,
    raters: Int64[np.ndarray, " n"],
    items: Int64[np.ndarray, " n"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Uncertainty:
    """How sure a fit is.

    Args:
        fit: to n comparisons.
        raters: number of the rater of each, from 0 without gaps.
        items: the same for the item, or the cluster of items.
        seed: of the resampling.
        resamples: how often a kind of cluster is resampled where there are few of them.
    """
    counts = {"raters": int(raters.max()) + 1, "items": int(items.max()) + 1}
    if min(counts.values()) >= FEW:
        return Uncertainty(spreads=(_sandwich(fit, raters, items),))
    labels = {"raters": raters, "items": items}
    rng = np.random.default_rng(seed)
    spreads = [_bootstrap(fit, labels[name], name, rng, resamples) for name, count in counts.items() if count > 1]
    if len(spreads) == 2:
        both = spreads[0].covariance + spreads[1].covariance - fit.inverse
        spreads.append(Spread(covariance=both, clusters=min(counts.values()), method="their sum"))
    return Uncertainty(spreads=tuple(spreads))


def _sandwich(fit: Fit, raters: np.ndarray, items: np.ndarray) -> Spread:
    tournament = fit.tournament
    scores = tournament.scores(fit.params)
    _, both = np.unique(raters * (items.max() + 1) + items, return_inverse=True)
    meat = np.diag(tournament.precision)
    for labels, sign in ((raters, 1), (items, 1), (both, -1)):
        sums = tournament.counts(labels) @ scores
        meat += sign * sums.shape[0] / (sums.shape[0] - 1) * (sums.T @ sums).toarray()
    covariance = fit.inverse @ meat @ fit.inverse
    # What is taken off can be more than there is; no direction has a variance below zero.
    sizes, directions = np.linalg.eigh((covariance + covariance.T) / 2)
    covariance = (directions * np.maximum(sizes, 0)) @ directions.T
    clusters = int(min(raters.max(), items.max())) + 1
    return Spread(covariance=covariance, clusters=clusters, method="sandwich clustered by rater and item")


def _bootstrap(fit: Fit, labels: np.ndarray, name: str, rng: np.random.Generator, resamples: int) -> Spread:
    tournament, clusters = fit.tournament, int(labels.max()) + 1
    counts = tournament.counts(labels).T.tocsr()
    drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)
    centre = rng.standard_normal((len(fit.params), resamples)) / np.sqrt(tournament.precision)[:, None]
    params = tournament.refit(lambda rows: np.asarray(counts @ drawn[rows].T), resamples, centre)
    covariance = np.cov(params) * clusters / (clusters - 1)
    return Spread(covariance=covariance, clusters=clusters, method=f"bootstrap over {clusters} {name}")


def rank_intervals(values: Float64[np.ndarray, " n"], between: Float64[np.ndarray, "n n"]) -> list[tuple[int, int]]:
    """The best and the worst rank that each system may have, 1 being the first.

    A system is surely behind each one that is better by more than the interval of their difference reaches:
    best = 1 + #{j: v_j - v_i > h_ij}, worst = n - #{j: v_i - v_j > h_ij}. Which system is called 0 is of no account.

    Args:
        values: the rating of each system, v.
        between: half the width of the interval of each difference, h.

    Example:
        >>> rank_intervals(np.array([1.5, 0.9, -0.5]), np.full((3, 3), 1.0))
        [(1, 2), (1, 2), (3, 3)]
    """
    behind = values[None] - values[:, None] > between
    best, worst = 1 + behind.sum(axis=1), len(values) - behind.sum(axis=0)
    return [(int(first), int(last)) for first, last in zip(best, worst, strict=True)]


def clustered_share(
    hits: Bool[np.ndarray, " n"], raters: Int64[np.ndarray, " n"], items: Int64[np.ndarray, " n"]
) -> Interval:
    """The share of votes of a kind, with Wilson's interval for as many votes as independent ones would be worth these.

    Where all agree nothing tells how alike the votes of a cluster are; then each cluster counts as one.

    Args:
        hits: for each of n >= 1 votes, whether it is of the kind.
        raters: number of the rater of each, from 0 without gaps.
        items: the same for the item, or the cluster of items.

    Example:
        >>> print(clustered_share(np.arange(40) % 4 == 0, np.arange(40), np.arange(40)))
        0.25 [0.138, 0.409] (n=40)
    """
    n, share = len(hits), float(hits.mean())
    residual = hits - share

    def one_way(labels: np.ndarray) -> tuple[float, int]:
        sums = np.bincount(labels, residual)
        return float((sums**2).sum()) / n**2 * len(sums) / max(1, len(sums) - 1), len(sums)

    ways = [one_way(labels) for labels in (raters, items)]
    fewest = min(size for _, size in ways)
    both, _ = one_way(np.unique(raters * (items.max() + 1) + items, return_inverse=True)[1])
    together = (ways[0][0] + ways[1][0] - both, fewest)
    if fewest >= FEW:
        ways = [together]
    elif together[0] > 0:
        ways.append(together)
    ways = [way for way in ways if way[1] > 1]
    if not ways:
        return Interval(value=share, low=-math.inf, high=math.inf, n=n, method="one rater and one item: no interval")
    ends = []
    for variance, clusters in ways:
        if variance > 0:
            spread = quantile(clusters) ** 2 / min(n, share * (1 - share) / variance)
        else:
            spread = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2 / clusters
        centre, half = share + spread / 2, math.sqrt(spread * share * (1 - share) + spread**2 / 4)
        ends.append(((centre - half) / (1 + spread), (centre + half) / (1 + spread)))
    # Rounding must not push the estimate out of its own interval.
    low, high = min(share, *(low for low, _ in ends)), max(share, *(high for _, high in ends))
    return Interval(value=share, low=low, high=high, n=n, method=f"Wilson, clustered by rater and item {LEVEL:g}")
