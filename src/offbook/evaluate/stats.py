"""Intervals and tests for evaluation results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offbook.errors import ConfigError

_BLOCK = 2_000_000  # random indices drawn at once by the bootstrap: 16 MB


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its uncertainty.

    Attributes:
        value: the estimate.
        low: lower end; minus infinity where the sample says nothing about it, as with one episode.
        high: upper end.
        n: number of independent observations behind it.
        method: how the ends were found, and at which level.
    """

    value: float
    low: float
    high: float
    n: int
    method: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; an end that is not known is null."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high, "n": self.n, "method": self.method}

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.value:.3g} (n={self.n}, interval unknown)"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n={self.n})"


def _check_counts(successes: int, n: int, level: float) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ConfigError(
            "success rate",
            expected="0 <= successes <= n and n >= 1",
            got=f"{successes} of {n}",
            fix="count finished episodes",
        )
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError("interval", expected="a level between 0 and 1", got=str(level), fix="use 0.95")


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate: short, near its nominal coverage on average.

    Args:
        successes: number of successes.
        n: number of trials, at least 1.
        level: confidence level in (0, 1).

    Raises:
        ConfigError: the counts or the level make no sense.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Example:
        >>> print(wilson(8, 10))
        0.8 [0.49, 0.943] (n=10)
    """
    _check_counts(successes, n, level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the end is exactly 0 or 1; rounding must not push the estimate out of its own interval.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(value=p, low=low, high=high, n=n, method=f"Wilson {level:g}")


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p) with 0 < p < 1 and 1 <= k <= n."""
    logs = np.arange(k, n + 1, dtype=np.float64)
    log_choose = math.lgamma(n + 1) - np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in range(k, n + 1)])
    return float(np.exp(log_choose + logs * math.log(p) + (n - logs) * math.log1p(-p)).sum())


def _solve(function: Callable[[float], float], target: float) -> float:
    """Where a function that grows on [0, 1] meets the target, to the last bit that bisection gives."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2


def clopper_pearson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """The exact interval of a success rate: covers at least at its level, whatever the true rate.

    Args:
        successes: number of successes.
        n: number of trials, at least 1.
        level: confidence level in (0, 1).

    Raises:
        ConfigError: the counts or the level make no sense.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits" (1934).

    Example:
        >>> print(clopper_pearson(8, 10))
        0.8 [0.444, 0.975] (n=10)
    """
    _check_counts(successes, n, level)
    alpha = (1 - level) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: _binomial_tail(successes, n, p), alpha)
    # P(X <= k | p) = alpha is P(X >= n - k | 1 - p) = alpha for the failures.
    high = 1.0 if successes == n else 1 - _solve(lambda q: _binomial_tail(n - successes, n, q), alpha)
    return Interval(value=successes / n, low=low, high=high, n=n, method=f"Clopper-Pearson {level:g}")


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """Two-sided p-value of equal success rates for two policies that met the same episodes.

    Args:
        first_only: episodes in which only the first policy succeeded.
        second_only: episodes in which only the second did.

    Returns:
        The exact binomial p-value in (0, 1]; 1 without a discordant pair.

    Raises:
        ConfigError: a count is negative.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions" (1947).

    Example:
        >>> mcnemar_exact(9, 1)
        0.021484375
    """
    if min(first_only, second_only) < 0:
        raise ConfigError(
            "McNemar's test", expected="counts >= 0", got=f"{first_only}, {second_only}", fix="count episodes"
        )
    n = first_only + second_only
    tail = sum(math.comb(n, i) for i in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / (1 << n))


def _resampled(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    seed: int,
    resamples: int,
    level: float,
    method: str,
) -> Interval:
    """Expanded percentile bootstrap over the rows of values [n, tasks], drawn independently for each task (column).

    The plain percentile interval is too narrow for few rows; its tails are widened as Student's t widens the normal.

    Source: Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section 5.3.
    """
    from scipy.special import ndtr, stdtrit

    _check_level(level)
    n, tasks = values.shape
    value = float(statistic(values[None])[0])
    # n rows all lie on one side of the truth in 2^(1 - n) of all cases: with so few no interval holds at this level.
    if 2.0 ** (1 - n) > 1 - level:
        return Interval(value=value, low=-math.inf, high=math.inf, n=values.size, method=method)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // values.size)
    parts = []
    for start in range(0, resamples, block):
        rows = rng.integers(n, size=(min(block, resamples - start), n, tasks))
        parts.append(statistic(values[rows, np.arange(tasks)]))
    tail = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2)))
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high), n=values.size, method=f"{method} {level:g}")


def _matrix(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise ConfigError(
            name,
            expected="finite numbers, shape (runs,) or (runs, tasks)",
            got=f"shape {np.shape(values)}" if np.isfinite(array).all() else "NaN or infinity",
            fix="pass one number for each finished episode",
        )
    return array


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """The mean with a percentile bootstrap interval.

    Args:
        values: one finite number for each independent episode, shape (n,).
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap samples.
        level: confidence level in (0, 1).

    Raises:
        ConfigError: no values, or not finite.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.

    Example:
        >>> print(bootstrap_mean([1.0, 2.0, 3.0, 4.0] * 3))
        2.5 [1.75, 3.25] (n=12)
    """
    matrix = _matrix(values, "bootstrap_mean").reshape(-1, 1)
    return _resampled(
        matrix, lambda x: x.mean(axis=(1, 2)), seed=seed, resamples=resamples, level=level, method="bootstrap mean"
    )


def bounded_mean(
    values: ArrayLike, low: float, high: float, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """The mean of scores from a known range; unlike a bootstrap it has width when all scores are equal, or few.

    An end is a quantile of the mean of the n scores and, as one score more, that end of the range, under weights drawn
    from Dirichlet(1, ..., 1). For scores that are all 0 or 1 it is Clopper and Pearson's, up to the noise of drawing.

    Args:
        values: one number in [low, high] for each independent episode, shape (n,).
        low: least score that is possible.
        high: largest score that is possible.
        seed: of the weights; the same seed gives the same interval.
        resamples: number of weightings.
        level: confidence level in (0, 1).

    Raises:
        ConfigError: no values, or one that is not finite or outside the range.

    Source: Gaffke's bound, as in Learned-Miller and Thomas, "A New Confidence Interval for the Mean of a Bounded Random
        Variable" (2019), section 2: it covers at its level in all cases that they prove or simulate.

    Example:
        >>> print(bounded_mean([1.0] * 10, 0.0, 1.0))
        1 [0.696, 1] (n=10)
    """
    _check_level(level)
    array = _matrix(values, "bounded_mean").reshape(-1)
    if not (low < high and low <= array.min() and array.max() <= high):
        got, fix = f"{array.min():g} to {array.max():g}", "correct the range or the scores"
        raise ConfigError("bounded_mean", expected=f"scores within {low:g} to {high:g}", got=got, fix=fix)
    rng, n, block = np.random.default_rng(seed), len(array), max(1, _BLOCK // (len(array) + 1))
    parts = []
    for start in range(0, resamples, block):
        weights = rng.standard_exponential((min(block, resamples - start), n + 1))
        weights /= weights.sum(axis=1, keepdims=True)
        parts.append((weights[:, :n] @ array, weights[:, n]))
    mean, extra = (np.concatenate(each) for each in zip(*parts, strict=True))
    tail = (1 - level) / 2
    ends = np.quantile(mean + low * extra, tail), np.quantile(mean + high * extra, 1 - tail)
    value, (first, last) = float(array.mean()), (float(np.clip(end, low, high)) for end in ends)
    # Rounding must not push the estimate out of its own interval.
    return Interval(value=value, low=min(first, value), high=max(last, value), n=n, method=f"bounded mean {level:g}")


def student_mean(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean with Student's interval: for a few independent runs, such as seeds, whose means are nearly normal.

    Args:
        values: one finite number for each run, shape (n,); with a single one the interval is without end.
        level: confidence level in (0, 1).

    Raises:
        ConfigError: no values, or not finite.

    Source: Student, "The probable error of a mean" (1908).

    Example:
        >>> print(student_mean([1.0, 2.0, 3.0]))
        2 [-0.484, 4.48] (n=3)
    """
    from scipy.special import stdtrit

    _check_level(level)
    array = _matrix(values, "student_mean").reshape(-1)
    n, value = len(array), float(array.mean())
    half = math.inf if n == 1 else float(stdtrit(n - 1, (1 + level) / 2) * array.std(ddof=1) / math.sqrt(n))
    return Interval(value=value, low=value - half, high=value + half, n=n, method=f"Student {level:g}")


def paired_bootstrap(
    first: Sequence[float] | NDArray[Any],
    second: Sequence[float] | NDArray[Any],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """The mean difference first - second over episodes that both met, with a bootstrap interval over the pairs.

    Args:
        first: one number for each episode, shape (n,).
        second: the other policy's numbers for the same episodes in the same order.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        level: confidence level in (0, 1).

    Raises:
        ConfigError: the lengths differ, or a number is not finite.

    Example:
        >>> print(paired_bootstrap([1.0, 2.0, 3.0] * 3, [0.5, 1.5, 2.0] * 3))
        0.667 [0.5, 0.889] (n=9)
    """
    if len(first) != len(second):
        raise ConfigError(
            "paired_bootstrap",
            expected="as many numbers from both policies",
            got=f"{len(first)} and {len(second)}",
            fix="evaluate both on the same seeds",
        )
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    interval = bootstrap_mean(difference, seed=seed, resamples=resamples, level=level)
    return Interval(
        value=interval.value, low=interval.low, high=interval.high, n=interval.n, method=f"paired bootstrap {level:g}"
    )


def unpaired_bootstrap(
    first: Sequence[float] | NDArray[Any], second: Sequence[float] | NDArray[Any], *, seed: int = 0
) -> Interval:
    """The difference of two means, first - second, of unrelated episodes; the bootstrap resamples each by itself.

    Args:
        first: one number for each episode, shape (n,).
        second: numbers of n other episodes.
        seed: of the resampling.

    Raises:
        ConfigError: the lengths differ, or a number is not finite.

    Example:
        >>> unpaired_bootstrap([1.0, 2.0, 3.0] * 3, [0.5, 1.5, 2.0] * 3).value
        0.6666666666666667
    """
    if len(first) != len(second):
        got, fix = f"{len(first)} and {len(second)}", "play as many episodes of each kind"
        raise ConfigError("unpaired_bootstrap", expected="as many numbers of both", got=got, fix=fix)
    both = _matrix(np.stack([np.asarray(first, np.float64), np.asarray(second, np.float64)], 1), "unpaired_bootstrap")
    found = _resampled(
        both, lambda x: x[:, :, 0].mean(1) - x[:, :, 1].mean(1), seed=seed, resamples=10_000, level=0.95,
        method="unpaired bootstrap",
    )  # fmt: skip
    return replace(found, n=len(both))


def _trimmed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    flat = np.sort(x.reshape(len(x), -1), axis=1)
    cut = flat.shape[1] // 4
    return np.asarray(flat[:, cut : flat.shape[1] - cut].mean(axis=1))


def iqm(scores: ArrayLike, *, seed: int = 0, resamples: int = 2_000, level: float = 0.95) -> Interval:
    """The interquartile mean, with a bootstrap interval stratified by task.

    Args:
        scores: shape (runs,) or (runs, tasks); runs of a task are resampled among themselves.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        level: confidence level in (0, 1).

    Raises:
        ConfigError: no scores, or not finite.

    Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021), section 4.

    Example:
        >>> iqm([0.0, 1.0, 2.0, 100.0]).value
        1.5
    """
    return _resampled(
        _matrix(scores, "iqm"),
        _trimmed,
        seed=seed,
        resamples=resamples,
        level=level,
        method="interquartile mean, stratified bootstrap",
    )
