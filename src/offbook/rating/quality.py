"""Signs of raters who do not look: wrong answers to gold pairs, haste, one side only, answers that nobody else gives.

A sign is not a verdict. Rules that turn signs into exclusions are written down before the votes are opened, and results
are shown with and without them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from offbook.errors import check_settings, needs_extra
from offbook.rating.agreement import repeated
from offbook.rating.bradley_terry import Comparisons, Tournament
from offbook.rating.records import Vote

with needs_extra("arena"):
    from scipy.special import bdtr


@dataclass(frozen=True, kw_only=True)
class RaterQuality:
    """What is known of one rater.

    Attributes:
        rater: pseudonym.
        cohort: of the rater.
        votes: answers and skips.
        skips: how many of them are skips.
        gold: answers to gold pairs.
        gold_failures: those that do not name the better output.
        repeats: answers to pairs that the rater had answered before.
        consistent: those that are as before.
        dwell_ms: median time from showing to answering, in milliseconds; None when not measured.
        hasty: answers given faster than the floor; None without a floor, or when not measured.
        left_share: share of the left among answers that name a side; None without one.
        streak_p: chance of as few changes of side, or fewer, were sides tossed like a coin; None below two answers.
        fit_z: log-likelihood of the answers under ratings from all other raters, less what those ratings expect, in
            standard deviations; far below 0 where they are like noise, or turned round. None with a single rater.
        excluded: rules that leave out at least one vote of the rater.
    """

    rater: str
    cohort: str
    votes: int
    skips: int
    gold: int
    gold_failures: int
    repeats: int
    consistent: int
    dwell_ms: float | None
    hasty: int | None
    left_share: float | None
    streak_p: float | None
    fit_z: float | None
    excluded: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When votes do not count, written down before any is seen; None leaves a rule out.

    Attributes:
        max_gold_failures: `gold`: a rater fails more than this share of the gold pairs, in [0, 1].
        min_dwell_ms: `dwell`: a vote was given faster than this, in milliseconds.
        max_hasty: `haste`: more than this share of a rater's votes were; needs `min_dwell_ms`.
        min_streak_p: `streak`: sides change as seldom only with less than this chance, in (0, 1).
        min_fit_z: `fit`: a rater's `fit_z` is below this; it also meets those who see what others do not.
    """

    max_gold_failures: float | None = None
    min_dwell_ms: int | None = None
    max_hasty: float | None = None
    min_streak_p: float | None = None
    min_fit_z: float | None = None

    def __post_init__(self) -> None:
        def share(value: float | None) -> bool:
            return value is None or 0 <= value <= 1

        dwell = self.min_dwell_ms is None or self.min_dwell_ms > 0
        haste = share(self.max_hasty) and (self.max_hasty is None or self.min_dwell_ms is not None)
        checks = {
            "max_gold_failures": (share(self.max_gold_failures), "a share in [0, 1]"),
            "min_dwell_ms": (dwell, "more than 0 milliseconds"),
            "max_hasty": (haste, "a share in [0, 1], and min_dwell_ms beside it"),
            "min_streak_p": (share(self.min_streak_p), "a chance in [0, 1]"),
            "min_fit_z": (self.min_fit_z is None or self.min_fit_z < 0, "a number below 0"),
        }
        check_settings(self, checks, "rules.")


def streak_p(sides: Sequence[str]) -> float | None:
    """The chance of as few changes of side, or fewer, in answers whose sides a fair coin decides.

    Which output stands on the left is drawn by lot, so that a rater who looks at outputs changes sides about as often
    as a coin, whose changes are binomial with n - 1 and 1/2. Sides are drawn in blocks with as many of either
    (`assign.BLOCK`), so that one who always prefers the same system changes somewhat oftener: the chance errs towards
    finding no streak. One who always names a side does not change at all.

    Args:
        sides: `"left"` or `"right"`, in the order in which they were given.

    Example:
        >>> streak_p(["left"] * 11)
        0.0009765625
    """
    tosses = len(sides) - 1
    if tosses < 1:
        return None
    changes = sum(a != b for a, b in itertools.pairwise(sides))
    return float(bdtr(changes, tosses, 0.5))


def fit_z(votes: Sequence[Vote]) -> dict[str, float]:
    """How far the answers of each rater are from what the others' ratings lead to expect, in standard deviations.

    Args:
        votes: of one kind of raters; real pairs without skips count.

    Returns:
        By rater; empty with fewer than two raters.

    Source: the standardised log-likelihood of person-fit statistics: Drasgow, Levine and Williams, "Appropriateness
        Measurement with Polychotomous Item Response Models and Standardized Indices" (1985).
    """
    used = [vote for vote in votes if vote.pair_kind == "real" and vote.choice != "skip"]
    names, labels = np.unique([vote.rater for vote in used], return_inverse=True)
    if len(names) < 2:
        return {}
    tournament = Tournament(Comparisons.of(used))
    counts = tournament.counts(labels)

    def without(rows: slice) -> NDArray[np.float64]:
        return np.asarray(tournament.weights[:, None] - counts[rows].toarray().T)

    found = {}
    params = tournament.refit(without, len(names))
    for i, name in enumerate(names):
        chance = tournament.probabilities(params[:, i : i + 1])
        log = np.log(np.maximum(chance, 1e-300))
        mean = (chance * log).sum(axis=0)
        spread = (chance * (log - mean) ** 2).sum(axis=0)
        given = np.asarray(counts[i].toarray())[0]
        cells = tournament.by_cell(given)
        variance = float(cells @ spread[:, 0])
        surprise = float(given @ tournament.by_triple(log)[:, 0] - cells @ mean[:, 0])
        if variance > 0:
            found[str(name)] = surprise / math.sqrt(variance)
    return found


def rater_quality(votes: Sequence[Vote], *, min_dwell_ms: int | None = None) -> list[RaterQuality]:
    """The signs of each rater, by name.

    Args:
        votes: of one kind of raters, excluded ones among them.
        min_dwell_ms: below this a vote is hasty, in milliseconds.
    """
    by_rater: dict[str, list[Vote]] = {}
    for vote in sorted(votes, key=lambda vote: vote.time):
        by_rater.setdefault(vote.rater, []).append(vote)
    surprise = fit_z(votes)
    return [_quality(of, surprise.get(name), min_dwell_ms) for name, of in sorted(by_rater.items())]


def _quality(votes: Sequence[Vote], surprise: float | None, min_dwell_ms: int | None) -> RaterQuality:
    """The signs of one rater, from votes in the order of time."""
    answers = [vote for vote in votes if vote.choice != "skip"]
    sides = [vote.choice for vote in answers if vote.winner is not None]
    gold = [vote for vote in answers if vote.pair_kind == "gold"]
    again = repeated(votes)
    dwell = [vote.dwell_ms for vote in answers if vote.dwell_ms is not None]
    return RaterQuality(
        rater=votes[0].rater,
        cohort=votes[0].cohort,
        votes=len(votes),
        skips=len(votes) - len(answers),
        gold=len(gold),
        gold_failures=sum(vote.winner != vote.expected for vote in gold),
        repeats=len(again),
        consistent=sum(same for _, same in again),
        dwell_ms=float(median(dwell)) if dwell else None,
        hasty=sum(ms < min_dwell_ms for ms in dwell) if dwell and min_dwell_ms is not None else None,
        left_share=sides.count("left") / len(sides) if sides else None,
        streak_p=streak_p(sides),
        fit_z=surprise,
        excluded=tuple(sorted({rule for vote in votes for rule in vote.excluded})),
    )


def apply_rules(votes: Sequence[Vote], rules: Rules) -> list[Vote]:
    """The votes, with the names of the rules that each one breaks added to `excluded`.

    A skip is no answer: nobody has to look for long before they give none.

    Args:
        votes: of any kinds of raters; each kind is judged by itself.
        rules: written down beforehand.
    """
    broken: dict[str, set[str]] = {}
    for kind in {vote.rater_kind for vote in votes}:
        same = [vote for vote in votes if vote.rater_kind == kind]
        broken |= {rater.rater: _broken(rater, rules) for rater in rater_quality(same, min_dwell_ms=rules.min_dwell_ms)}
    found = []
    for vote in votes:
        names = broken[vote.rater] | set(vote.excluded)
        if vote.choice != "skip" and vote.dwell_ms is not None and vote.dwell_ms < (rules.min_dwell_ms or 0):
            names = names | {"dwell"}
        found.append(replace(vote, excluded=tuple(sorted(names))))
    return found


def _broken(rater: RaterQuality, rules: Rules) -> set[str]:
    """The rules that leave out all votes of a rater."""
    answers = rater.votes - rater.skips
    signs: Mapping[str, tuple[float | None, float | None]] = {
        "gold": (rules.max_gold_failures, rater.gold_failures / rater.gold if rater.gold else None),
        "haste": (rules.max_hasty, rater.hasty / answers if rater.hasty is not None else None),
    }
    found = {name for name, (limit, sign) in signs.items() if limit is not None and sign is not None and sign > limit}
    floors: Mapping[str, tuple[float | None, float | None]] = {
        "streak": (rules.min_streak_p, rater.streak_p),
        "fit": (rules.min_fit_z, rater.fit_z),
    }
    return found | {
        name for name, (limit, sign) in floors.items() if limit is not None and sign is not None and sign < limit
    }
