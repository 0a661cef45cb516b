"""Whether raters agree with one another, and with themselves.

Answers are compared as seen from the pair: that the system whose name comes first in the alphabet is better, that the
other is, or that neither is (a tie, or both bad). A skip is no answer.

An interval is the wider of two: from resampling items, and from leaving out one rater after the other, the jackknife,
for other raters agree otherwise. With two raters, and between kinds, it is over items and speaks for these raters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.evaluate.stats import Interval
from offbook.rating.intervals import LEVEL, quantile
from offbook.rating.records import Vote

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far raters of one kind agree about the same pairs.

    Attributes:
        pairs: number of pairs with answers of two raters or more.
        raters: number of raters of those pairs.
        raw: share of the pairs of answers to the same pair that are equal.
        alpha: Krippendorff's, of nominal answers: 1 is agreement, 0 is what chance gives.
        reasons: the same for each reason: whether raters of a pair gave it.
    """

    pairs: int
    raters: int
    raw: Interval | None
    alpha: Interval | None
    reasons: Mapping[str, Interval | None] = field(default_factory=dict)


def answer(vote: Vote) -> str | None:
    """What a vote says of its pair: `"first"`, `"second"` or `"neither"`; None when it was skipped."""
    if vote.choice == "skip":
        return None
    return {None: "neither", min(vote.left, vote.right): "first"}.get(vote.winner, "second")


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha of nominal values, whoever gave them.

    With n values in units of two or more, alpha = 1 - D_o / D_e, where D_o is the share of differing values among those
    of a unit, each unit weighted by its number of values, and D_e the share among all.

    Args:
        units: the values that each unit has got; those with fewer than two say nothing.

    Returns:
        At most 1; None where it is not defined: no unit has two values, or all values are equal.

    Source: Hayes and Krippendorff, "Answering the Call for a Standard Reliability Measure for Coding Data" (2007).

    Example:
        >>> krippendorff_alpha([["a", "a"], ["b", "b"], ["a", "b"]])
        0.4444444444444444
    """
    return _alpha(_counted(units, _numbered(units)).sum(axis=0))


def _numbered(units: Sequence[Sequence[Hashable]]) -> dict[Hashable, int]:
    return {value: i for i, value in enumerate(dict.fromkeys(value for unit in units for value in unit))}


def _counted(units: Sequence[Sequence[Hashable]], values: Mapping[Hashable, int]) -> NDArray[np.float64]:
    """For each unit: equal pairs of answers, all pairs, the equal ones by value as alpha weights them, uses of each."""
    rows = np.zeros((len(units), 3 + len(values)))
    for row, unit in zip(rows, units, strict=True):
        if len(unit) > 1:
            counts = Counter(unit)
            equal = sum(count * (count - 1) for count in counts.values())
            row[:3] = equal, len(unit) * (len(unit) - 1), equal / (len(unit) - 1)
            for value, count in counts.items():
                row[3 + values[value]] = count
    return rows


def _judged(
    units: Sequence[Sequence[Vote]], say: Callable[[Vote], Hashable]
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """What is counted of the answers to units, and the sums that are left without each rater."""
    answers = [[say(vote) for vote in unit] for unit in units]
    values = _numbered(answers)
    rows = _counted(answers, values)
    places: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        for vote in unit:
            places.setdefault(vote.rater, []).append(i)
    total, without = rows.sum(axis=0), []
    for rater, own in places.items():
        rest = [[said for said, vote in zip(answers[i], units[i], strict=True) if vote.rater != rater] for i in own]
        without.append(total - rows[own].sum(axis=0) + _counted(rest, values).sum(axis=0))
    return rows, without


def _alpha(sums: NDArray[np.float64]) -> float | None:
    uses = sums[3:]
    n = float(uses.sum())
    expected = n * (n - 1) - float((uses * (uses - 1)).sum())
    return 1 - (1 - float(sums[2]) / n) * n * (n - 1) / expected if expected > 0 else None


def _raw(sums: NDArray[np.float64]) -> float | None:
    return float(sums[0] / sums[1]) if sums[1] > 0 else None


def _with_interval(
    rows: NDArray[np.float64],
    clusters: Sequence[str],
    figure: Callable[[NDArray[np.float64]], float | None],
    seed: int,
    least: float,
    without: Sequence[NDArray[np.float64]] = (),
) -> Interval | None:
    """A figure of the sums of rows, with an interval over clusters of items and, by the sums without each, raters."""
    value = figure(rows.sum(axis=0))
    if value is None:
        return None
    names, labels = np.unique(np.asarray(clusters), return_inverse=True)
    count = len(names)
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, labels, rows)
    n = int((rows[:, 1] > 0).sum())
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    known = [found for each in drawn @ sums if (found := figure(each)) is not None]
    spread = float(np.std(known)) if known else 0.0
    half = quantile(count) * spread * math.sqrt(count / (count - 1)) if count > 1 else 0.0
    of_raters = _jackknife([figure(each) for each in without])
    items, raters = f"bootstrap over {count} items", f"jackknife over {len(without)} raters"
    method = f"{items}, for these raters {LEVEL:g}" if of_raters is None else f"wider of {items} and {raters} {LEVEL:g}"
    if half == 0:
        # Equal numbers show no spread, which is not to say that there is none.
        return Interval(value=value, low=-math.inf, high=math.inf, n=n, method=method)
    half = max(half, of_raters or 0.0)
    return Interval(value=value, low=max(least, value - half), high=min(1.0, value + half), n=n, method=method)


def _jackknife(lacking: Sequence[float | None]) -> float | None:
    """How far an interval reaches by the figures without each rater; None where there are too few to tell."""
    known = sorted(each for each in lacking if each is not None)
    if len(known) < max(3, len(lacking)):
        return None
    return quantile(len(known)) * math.sqrt((len(known) - 1) * float(np.var(known)))


def agreement(votes: Sequence[Vote], *, seed: int = 0) -> Agreement:
    """How far the raters agree about the real pairs; figures are None where they are not defined, as with one rater.

    Args:
        votes: of one kind of raters; the first answer of a rater to a pair counts.
        seed: of the resampling.
    """
    units = [unit for unit in _by_pair(votes) if len(unit) > 1]
    clusters = [unit[0].group for unit in units]
    rows, without = _judged(units, answer)
    given = sorted({reason for unit in units for vote in unit for reason in vote.reasons})
    return Agreement(
        pairs=len(units),
        raters=len({vote.rater for unit in units for vote in unit}),
        raw=_with_interval(rows, clusters, _raw, seed, 0.0, without),
        alpha=_with_interval(rows, clusters, _alpha, seed, -1.0, without),
        reasons={reason: _of_reason(reason, units, clusters, seed) for reason in given},
    )


def _of_reason(reason: str, units: Sequence[Sequence[Vote]], clusters: Sequence[str], seed: int) -> Interval | None:
    rows, without = _judged(units, lambda vote: reason in vote.reasons)
    return _with_interval(rows, clusters, _alpha, seed, -1.0, without)


def _by_pair(votes: Sequence[Vote]) -> list[list[Vote]]:
    """The answers to each real pair, one of each rater."""
    units: dict[str, dict[str, Vote]] = {}
    for vote in votes:
        if vote.pair_kind == "real" and answer(vote) is not None:
            units.setdefault(vote.pair, {}).setdefault(vote.rater, vote)
    return [list(unit.values()) for unit in units.values()]


def agreement_between(first: Sequence[Vote], second: Sequence[Vote], *, seed: int = 0) -> Interval | None:
    """How often a rater of one kind answers a pair as one of another kind does; None where they share no pair.

    Args:
        first: votes of one kind of raters.
        second: votes of another.
        seed: of the resampling.
    """
    others = {unit[0].pair: [answer(vote) for vote in unit] for unit in _by_pair(second)}
    rows: list[tuple[int, int]] = []
    clusters: list[str] = []
    for unit in _by_pair(first):
        theirs = others.get(unit[0].pair)
        if theirs:
            ours = [answer(vote) for vote in unit]
            rows.append((sum(a == b for a in ours for b in theirs), len(ours) * len(theirs)))
            clusters.append(unit[0].group)
    if not rows:
        return None
    return _with_interval(np.array(rows, np.float64), clusters, _raw, seed, 0.0)


def repeated(votes: Sequence[Vote]) -> list[tuple[Vote, bool]]:
    """The votes on repeats of a pair that the same rater had answered, and whether the answer is the same.

    Args:
        votes: of any raters.
    """
    asked: dict[tuple[str, str], Any] = {}
    for vote in votes:
        if vote.pair_kind != "repeat":
            asked.setdefault((vote.rater, vote.pair), answer(vote))
    found = []
    for vote in votes:
        if vote.repeat_of is not None and answer(vote) is not None:
            before = asked.get((vote.rater, vote.repeat_of))
            if before is not None:
                found.append((vote, before == answer(vote)))
    return found
