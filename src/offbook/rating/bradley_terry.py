r"""Bradley and Terry's model of paired comparisons with Davidson's ties, a left-side term and regressors of style.

With :math:`\pi = e^\theta` for each system,

.. math::
    P(i \succ j) = \pi_i / Z, \quad P(tie) = 2 \nu \sqrt{\pi_i \pi_j} / Z, \quad
    Z = \pi_i + \pi_j + 2 \nu \sqrt{\pi_i \pi_j}

so that the answer depends on :math:`d = \theta_i - \theta_j` alone. The system on the left gets :math:`\gamma` more,
and :math:`x \cdot \beta` for the differences x of the two outputs' features. Each theta has a Gaussian prior of
standard deviation 2, which keeps a system without losses finite. The other parameters have one of standard deviation
100: it matters only where the votes alone would send them to infinity, as where nobody calls a tie.

Equal votes count as one with a weight, and many weightings of the same votes are fitted at once.

Source: Davidson, "On Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparison Experiments" (1970).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from os import cpu_count
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from offbook.errors import DataError, needs_extra
from offbook.rating.records import Vote

with needs_extra("arena"):
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

PRIOR_SD = 2.0
WEAK_PRIOR_SD = 100.0
LEFT, RIGHT, TIE = range(3)
_OUTCOMES = {"left": LEFT, "right": RIGHT, "tie": TIE, "both_bad": TIE}
_ROUNDS, _FEW_ROUNDS, _RENEWALS, _HALVINGS, _MEMORY = 40, 6, 60, 40, 8
_NUMBERS = 200_000  # in an array of weightings that are fitted at once: a few such stay in the processor's cache
_FARTHEST = 300.0  # log-odds beyond which nothing changes, and below which nothing overflows
_EXACT, _NEAR = 1e-16, 1e-8  # squared distance from the optimum, in standard errors, where a fit ends

Slope = Callable[[Float64[np.ndarray, "p r"]], Float64[np.ndarray, "p r"]]


def normalised_difference(a: float, b: float) -> float:
    """The difference of a feature of two outputs, in [-1, 1]: (a - b) / (|a| + |b|), and 0 where both are 0.

    Example:
        >>> normalised_difference(300.0, 100.0)
        0.5
    """
    return (a - b) / (abs(a) + abs(b)) if a or b else 0.0


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Answers as numbers.

    Attributes:
        systems: names.
        left: index of the system on the left, for each of n answers.
        right: of the other.
        outcome: `LEFT`, `RIGHT` or `TIE`.
        features: names of the regressors.
        style: their values, left against right.
    """

    systems: tuple[str, ...]
    left: Int64[np.ndarray, " n"]
    right: Int64[np.ndarray, " n"]
    outcome: Int64[np.ndarray, " n"]
    features: tuple[str, ...] = ()
    style: Float64[np.ndarray, "n features"]

    @classmethod
    def of(cls, votes: Sequence[Vote], features: Sequence[str] = ()) -> Comparisons:
        """The answers in votes none of which is a skip.

        Args:
            votes: n of them; that both are bad is a tie.
            features: names of numbers that all votes have for both sides.
        """
        systems = sorted({name for vote in votes for name in (vote.left, vote.right)})
        number = {name: i for i, name in enumerate(systems)}
        style = [
            [normalised_difference(float(vote.left_features[f]), float(vote.right_features[f])) for f in features]
            for vote in votes
        ]
        return cls(
            systems=tuple(systems),
            left=np.array([number[vote.left] for vote in votes], np.int64),
            right=np.array([number[vote.right] for vote in votes], np.int64),
            outcome=np.array([_OUTCOMES[vote.choice] for vote in votes], np.int64),
            features=tuple(features),
            style=np.array(style, np.float64).reshape(len(votes), len(features)),
        )


class Tournament:
    """Comparisons, with equal ones taken together, and the likelihood of parameters given weights of them.

    A *cell* is a distinct (left, right, features), of which there are k; a *triple* a distinct cell and outcome, t of
    them. The p parameters are the thetas of all systems in their order, gamma, log nu, and the betas.

    Args:
        comparisons: n of them, at least one.

    Attributes:
        comparisons: as given.
        triple: to which triple each comparison belongs, shape (n,).
        components: for each system the number of its part of the graph of comparisons: no order holds between parts.
        weights: how often each triple occurs, shape (t,).
        precision: of the priors, shape (p,).
    """

    def __init__(self, comparisons: Comparisons) -> None:
        self.comparisons = comparisons
        count, n = len(comparisons.systems), len(comparisons.left)
        pair = comparisons.left * count + comparisons.right
        if comparisons.features:
            _, pair = np.unique(np.column_stack([pair, comparisons.style]), axis=0, return_inverse=True)
        _, first, cell = np.unique(pair, return_index=True, return_inverse=True)
        kinds, self.triple, counts = np.unique(3 * cell + comparisons.outcome, return_inverse=True, return_counts=True)
        self.weights = counts.astype(np.float64)
        self._cell, self._outcome = np.divmod(kinds, 3)
        self._starts = np.searchsorted(self._cell, np.arange(len(first)))
        self.gamma, self.log_nu, size = count, count + 1, count + 2 + len(comparisons.features)
        self.precision = np.full(size, WEAK_PRIOR_SD**-2)
        self.precision[:count] = PRIOR_SD**-2
        left, right, row, one = comparisons.left[first], comparisons.right[first], np.arange(len(first)), np.ones_like
        columns = [left, right, np.full_like(left, self.gamma)]
        values = [one(left, float), -one(left, float), one(left, float)]
        for i in range(len(comparisons.features)):
            columns.append(np.full_like(left, count + 2 + i))
            values.append(comparisons.style[first, i])
        place = (np.tile(row, len(columns)), np.concatenate(columns))
        self._design = sparse.csr_matrix((np.concatenate(values), place), shape=(len(first), size))
        self._transposed = self._design.T.tocsr()
        self._sums = self._per_triple(np.array([0.5, -0.5, 0.0])[self._outcome], self._outcome == TIE).T.tocsr()
        links = sparse.csr_matrix((np.ones(n), (comparisons.left, comparisons.right)), shape=(count, count))
        self.components = connected_components(links, directed=False)[1].astype(np.int64)

    def _per_triple(self, of_d: np.ndarray, of_log_nu: np.ndarray) -> Any:
        """Slopes by the parameters, from those by d and by log nu: sparse, shape (t, p)."""
        t, size = len(self._cell), len(self.precision)
        column = (of_log_nu.astype(float), (np.arange(t), np.full(t, self.log_nu)))
        return sparse.diags(of_d) @ self._design[self._cell] + sparse.csr_matrix(column, shape=(t, size))

    def counts(self, labels: Int64[np.ndarray, " n"]) -> Any:
        """How many comparisons of each triple a group has: sparse, shape (groups, t).

        Args:
            labels: number of the group of each comparison, from 0.
        """
        shape = (int(labels.max()) + 1, len(self._cell))
        return sparse.csr_matrix((np.ones(len(labels)), (labels, self.triple)), shape=shape)

    def probabilities(self, params: Float64[np.ndarray, "p r"]) -> Float64[np.ndarray, "3 k r"]:
        """Of left, right and tie in each cell, under each column of parameters."""
        half, tie = self._design @ params / 2, np.log(2) + params[self.log_nu]
        log = np.stack([half, -half, np.broadcast_to(tie, half.shape)])
        log -= log.max(axis=0)
        weight = np.exp(log)
        return np.asarray(weight / weight.sum(axis=0))

    def by_triple(self, of_outcomes: Float64[np.ndarray, "3 k r"]) -> Float64[np.ndarray, "t r"]:
        """The value of each triple among values of all outcomes of its cell."""
        return of_outcomes[self._outcome, self._cell]

    def by_cell(self, weights: np.ndarray) -> np.ndarray:
        """The weights of cells, shape (k,) or (k, r), from those of their triples."""
        return np.add.reduceat(weights, self._starts, axis=0)

    def scores(self, params: Float64[np.ndarray, " p"]) -> Any:
        """Slope of the log-likelihood of one comparison of each triple: sparse, shape (t, p)."""
        p = self.probabilities(params[:, None])[..., 0][:, self._cell]
        won = np.array([0.5, -0.5, 0.0])[self._outcome]
        return self._per_triple(won - (p[LEFT] - p[RIGHT]) / 2, (self._outcome == TIE) - p[TIE])

    def information(
        self, params: Float64[np.ndarray, " p"], weights: Float64[np.ndarray, " t"]
    ) -> Float64[np.ndarray, "p p"]:
        """Curvature of the negative log-posterior."""
        left, right, tie = self.probabilities(params[:, None])[..., 0]
        total, balance = self.by_cell(weights), (left - right) / 2
        of_d = total * ((1 - tie) / 4 - balance**2)
        found = (self._transposed @ sparse.diags(of_d) @ self._design).toarray() + np.diag(self.precision)
        mixed = self._transposed @ (-total * balance * tie)
        found[self.log_nu] += mixed
        found[:, self.log_nu] += mixed
        found[self.log_nu, self.log_nu] += float((total * tie * (1 - tie)).sum())
        return np.asarray(found)

    def slope(self, weights: Float64[np.ndarray, "t r"], centre: Float64[np.ndarray, "p r"]) -> Slope:
        """The slope of the log-posterior, one column for each weighting and centre of the priors."""
        total, sums = self.by_cell(weights), self._sums @ weights

        def at(params: np.ndarray) -> np.ndarray:
            # In place, of (r^2 - 1) / (r^2 + 1 + tie r) with r = exp(d / 2): memory is what takes the time.
            root = self._design @ params
            root /= 2
            np.exp(np.clip(root, -_FARTHEST, _FARTHEST, out=root), out=root)
            square, tie = root * root, 2 * np.exp(np.minimum(params[self.log_nu], _FARTHEST))
            share = tie * root
            share += square
            share += 1
            np.divide(total, share, out=share)
            root *= share
            square -= 1
            square *= share
            found = sums - self.precision[:, None] * (params - centre) - self._transposed @ square / 2
            found[self.log_nu] -= tie * root.sum(axis=0)
            return np.asarray(found)

        return at

    @cached_property
    def fit(self) -> Fit:
        """The parameters of the highest posterior, with all comparisons."""
        params = np.zeros(len(self.precision))
        ties = self.weights[self._outcome == TIE].sum()
        params[self.log_nu] = np.log((ties + 0.5) / (self.weights.sum() - ties + 0.5))
        params = self._settle(self.weights, np.zeros_like(params), params, _EXACT)
        return Fit(tournament=self, params=params, inverse=np.linalg.inv(self.information(params, self.weights)))

    def _settle(self, weights: np.ndarray, centre: np.ndarray, params: np.ndarray, tolerance: float) -> np.ndarray:
        """The parameters under one weighting, from a curvature that is renewed on the way."""
        slope = self.slope(weights[:, None], centre[:, None])
        for _ in range(_RENEWALS):
            inverse = np.linalg.inv(self.information(params, weights))
            found, done = _maximise(slope, params[:, None], inverse, tolerance, _FEW_ROUNDS)
            params = found[:, 0]
            if done.all():
                return params
        got = f"{len(params)} parameters for {weights.sum():g} votes on which it does not"
        raise DataError("ratings", expected="a fit that comes to an end", got=got, fix="leave out features or systems")

    def refit(
        self,
        weights: Callable[[slice], np.ndarray],
        count: int,
        centre: Float64[np.ndarray, "p r"] | None = None,
        *,
        exact: bool = False,
    ) -> Float64[np.ndarray, "p r"]:
        """The parameters under other weights of the triples.

        Args:
            weights: gives those of a range of the weightings, shape (t, length of the range).
            count: of the weightings, r.
            centre: of the priors, one column for each weighting; all 0 when not given.
            exact: go on as long as for `fit`; else to a ten thousandth of a standard error.
        """
        fit, together = self.fit, max(8, min(128, _NUMBERS // self._design.shape[0]))
        found = np.empty((len(self.precision), count))
        around = np.zeros_like(found) if centre is None else centre
        end = _EXACT if exact else _NEAR

        def work(start: int) -> None:
            rows = slice(start, min(start + together, count))
            chosen = weights(rows)
            params = np.repeat(fit.params[:, None], chosen.shape[1], axis=1)
            params, done = _maximise(self.slope(chosen, around[:, rows]), params, fit.inverse, end, _ROUNDS)
            # Where little of the whole is left, its curvature is no guide.
            for i in np.flatnonzero(~done):
                params[:, i] = self._settle(chosen[:, i], around[:, start + i], params[:, i], end)
            found[:, rows] = params

        with ThreadPoolExecutor(min(4, cpu_count() or 1)) as pool:
            list(pool.map(work, range(0, count, together)))
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """The parameters of a tournament.

    Attributes:
        tournament: what was fitted.
        params: theta of each system, gamma, log nu, betas.
        inverse: of the curvature of the negative log-posterior there.
    """

    tournament: Tournament
    params: Float64[np.ndarray, " p"]
    inverse: Float64[np.ndarray, "p p"]

    def contrasts(self, anchor: str | None = None) -> Float64[np.ndarray, "systems p"]:
        """What makes ratings of parameters: theta less the mean of its component, or less the theta of an anchor.

        Args:
            anchor: name of a system; components without it have their mean at 0.
        """
        systems, components = self.tournament.comparisons.systems, self.tournament.components
        same = components[:, None] == components[None]
        zero = same / same.sum(axis=1, keepdims=True)
        if anchor in systems:
            place = systems.index(anchor)
            zero[same[place]] = np.eye(len(systems))[place]
        found = np.zeros((len(systems), len(self.params)))
        found[:, : len(systems)] = np.eye(len(systems)) - zero
        return found


def _maximise(
    slope: Slope, params: np.ndarray, inverse: np.ndarray, tolerance: float, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Maximises concave functions, one a column, by L-BFGS that starts from an inverse curvature good for all of them.

    Slopes alone say whether a step is too long, as values hide small gains by rounding.

    Returns:
        The parameters, and for each column whether it is at its end.

    Source: Nocedal and Wright, "Numerical Optimization" (2006), algorithm 7.4, and the approximate Wolfe condition of
        Hager and Zhang, "A New Conjugate Gradient Method with Guaranteed Descent" (2005), section 4.
    """
    kept: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = deque(maxlen=_MEMORY)
    steep = slope(params)
    for _ in range(rounds):
        direction = _direction(steep, kept, inverse)
        gain = (direction * steep).sum(axis=0)
        size = (gain > tolerance).astype(float)
        if not size.any():
            break
        for _ in range(_HALVINGS):
            after = slope(params + size * direction)
            beyond = ~((direction * after).sum(axis=0) >= -0.8 * gain) & (size > 0)
            if not beyond.any():
                break
            size[beyond] /= 2
        step, change = size * direction, steep - after
        curvature = (step * change).sum(axis=0)
        inverted = np.divide(1, curvature, out=np.zeros_like(curvature), where=curvature > 0)
        kept.append((step, change, inverted))
        params, steep = params + step, after
    return params, size == 0


def _direction(
    slope: np.ndarray, kept: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], inverse: np.ndarray
) -> np.ndarray:
    """The step that L-BFGS wants, from the steps and changes of slope that it remembers."""
    rest, shares = slope.copy(), []
    for step, change, inverted in reversed(kept):
        shares.append(inverted * (step * rest).sum(axis=0))
        rest -= shares[-1] * change
    found = inverse @ rest
    for (step, change, inverted), share in zip(kept, reversed(shares), strict=True):
        found += step * (share - inverted * (change * found).sum(axis=0))
    return np.asarray(found)
