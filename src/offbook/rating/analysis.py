"""The front door of the statistics: everything that a file of votes says, as one value.

Kinds of raters are never pooled: people, language models and scripts each have figures of their own, first of the votes
that count and, where rules left votes out, of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args

import numpy as np

from offbook.errors import ConfigError, nearest
from offbook.evaluate.stats import Interval
from offbook.rating.agreement import Agreement, agreement, agreement_between, repeated
from offbook.rating.intervals import RESAMPLES, clustered_share
from offbook.rating.quality import RaterQuality, rater_quality
from offbook.rating.ranking import Ranking, numbered, rank
from offbook.rating.records import RaterKind, Vote, check_votes

NOT_ENOUGH = "not enough data: no vote on a real pair counts"


@dataclass(frozen=True, kw_only=True)
class Share:
    """One system beside the anchor, in their direct comparisons.

    Attributes:
        system: its name.
        equal_or_better: share of the votes that do not prefer the anchor.
        better: share of those that prefer the system.
        both_bad: share of those that call both bad; part of `equal_or_better`.
    """

    system: str
    equal_or_better: Interval
    better: Interval
    both_bad: Interval


@dataclass(frozen=True, kw_only=True)
class Group:
    """The votes of one kind of raters.

    Attributes:
        kind: of the raters.
        with_excluded: whether votes that rules leave out are among them.
        votes: number of votes, those on gold and repeated pairs and skips included.
        skips: how many of them are skips.
        excluded: how many votes of this kind rules leave out, by rule; a vote may break several.
        both_bad: share of the answers to real pairs that call both bad; None without an answer.
        ranking: of the systems; None without an answer.
        controlled: the same with the style of the outputs controlled for; None where that was not asked for.
        unranked: systems that no counted answer compares.
        shares: of systems that were compared with the anchor.
        agreement: between raters.
        gold_failures: share of answers to gold pairs that do not name the better output; None without one.
        consistency: share of answers to repeated pairs that are as before; None without one.
        quality: signs of each rater, whatever rules say.
        note: what a reader must know beside the figures.
    """

    kind: RaterKind
    with_excluded: bool
    votes: int
    skips: int
    excluded: Mapping[str, int]
    both_bad: Interval | None
    ranking: Ranking | None
    controlled: Ranking | None
    unranked: tuple[str, ...]
    shares: tuple[Share, ...]
    agreement: Agreement
    gold_failures: Interval | None
    consistency: Interval | None
    quality: tuple[RaterQuality, ...]
    note: str


@dataclass(frozen=True, kw_only=True)
class Between:
    """How often raters of two kinds answer the same pair alike.

    Attributes:
        first: a kind.
        second: another.
        agreement: share of equal answers; None where they share no pair.
    """

    first: RaterKind
    second: RaterKind
    agreement: Interval | None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """All statistics of a study.

    Attributes:
        study: its name; empty without votes.
        votes: number of votes.
        groups: by kind of rater, the votes that count before all of them.
        between: of kinds, by the votes that count.
    """

    study: str
    votes: int
    groups: tuple[Group, ...]
    between: tuple[Between, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ends of intervals that are not known are null."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def analyse(
    votes: Sequence[Vote],
    *,
    anchor: str | None = None,
    features: Sequence[str] = (),
    min_dwell_ms: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Analysis:
    """Computes everything; the same votes in another order give the same figures.

    Args:
        votes: of one study, any kinds of raters, excluded ones among them.
        anchor: system whose rating is 0, and beside which shares are told.
        features: to control for in a second ranking, by name.
        min_dwell_ms: faster votes are counted as hasty, in milliseconds.
        seed: of all resampling.
        resamples: how often clusters are resampled where there are few.

    Raises:
        DataError: votes contradict one another.
        ConfigError: no vote knows the anchor or a feature.

    Example:
        >>> made = [Vote(study="s", id=str(i), pair=str(i), item=str(i), rater="r", left="ab"[i % 2],
        ...              right="ba"[i % 2], choice=("left", "right", "tie")[i % 4 % 3],
        ...              created="2026-01-31T12:00:00+00:00") for i in range(40)]
        >>> ranking = analyse(made).groups[0].ranking
        >>> [(rating.system, rating.wins, rating.ties, rating.ranks) for rating in ranking.ratings]
        [('a', 20, 10, (1, 2)), ('b', 10, 10, (1, 2))]
    """
    check_votes(votes)
    votes = sorted(votes, key=lambda vote: (vote.time, vote.id))
    _check_names(votes, anchor, features)
    kinds = [kind for kind in get_args(RaterKind) if any(vote.rater_kind == kind for vote in votes)]
    counted = {kind: [v for v in votes if v.rater_kind == kind and not v.excluded] for kind in kinds}
    groups: list[Group] = []
    for kind in kinds:
        same = [vote for vote in votes if vote.rater_kind == kind]
        quality = tuple(rater_quality(same, min_dwell_ms=min_dwell_ms))
        chosen = [counted[kind]] if len(counted[kind]) == len(same) else [counted[kind], same]
        groups += [_group(same, each, quality, anchor, features, seed, resamples) for each in chosen]
    between = [
        Between(first=a, second=b, agreement=agreement_between(counted[a], counted[b], seed=seed))
        for a, b in itertools.combinations(kinds, 2)
    ]
    study = votes[0].study if votes else ""
    return Analysis(study=study, votes=len(votes), groups=tuple(groups), between=tuple(between))


def _check_names(votes: Sequence[Vote], anchor: str | None, features: Sequence[str]) -> None:
    systems = {name for vote in votes for name in (vote.left, vote.right)}
    if anchor is not None and votes and anchor not in systems:
        raise ConfigError("anchor", expected="a system of the study", got=repr(anchor), fix=nearest(anchor, systems))
    ranked = [vote for vote in votes if vote.pair_kind == "real" and vote.choice != "skip"]
    known = {name for vote in ranked for name in vote.left_features}
    for name in features:
        lacking = next((vote.id for vote in ranked if name not in vote.left_features), None)
        if lacking is not None:
            fix = "measure all outputs" if name in known or not known else nearest(name, known)
            got = f"vote {lacking!r} without {name!r}"
            raise ConfigError("features", expected="names that all votes on real pairs have", got=got, fix=fix)


def _group(
    same: Sequence[Vote],
    votes: Sequence[Vote],
    quality: tuple[RaterQuality, ...],
    anchor: str | None,
    features: Sequence[str],
    seed: int,
    resamples: int,
) -> Group:
    """The figures of some of the votes of one kind of raters."""
    real = [vote for vote in votes if vote.pair_kind == "real" and vote.choice != "skip"]
    gold = [vote for vote in votes if vote.pair_kind == "gold" and vote.choice != "skip"]
    again = repeated(votes)
    rules = sorted({rule for vote in same for rule in vote.excluded})
    ranking = rank(votes, anchor=anchor, seed=seed, resamples=resamples)
    named = {name for vote in votes if vote.pair_kind == "real" for name in (vote.left, vote.right)}
    return Group(
        kind=same[0].rater_kind,
        with_excluded=any(vote.excluded for vote in votes),
        votes=len(votes),
        skips=sum(vote.choice == "skip" for vote in votes),
        excluded={rule: sum(rule in vote.excluded for vote in same) for rule in rules},
        both_bad=_share(real, [vote.choice == "both_bad" for vote in real]) if real else None,
        ranking=ranking,
        controlled=rank(votes, anchor=anchor, features=features, seed=seed, resamples=resamples) if features else None,
        unranked=tuple(sorted(named - {name for vote in real for name in (vote.left, vote.right)})),
        shares=_shares(real, anchor) if anchor is not None else (),
        agreement=agreement(votes, seed=seed),
        gold_failures=_share(gold, [vote.winner != vote.expected for vote in gold]) if gold else None,
        consistency=_share([vote for vote, _ in again], [equal for _, equal in again]) if again else None,
        quality=quality,
        note=_note(ranking),
    )


def _share(votes: Sequence[Vote], hits: Sequence[bool]) -> Interval:
    raters, items = (numbered([getattr(vote, name) for vote in votes]) for name in ("rater", "group"))
    return clustered_share(np.asarray(hits, bool), raters, items)


def _shares(votes: Sequence[Vote], anchor: str) -> tuple[Share, ...]:
    beside: dict[str, list[Vote]] = {}
    for vote in votes:
        if anchor in (vote.left, vote.right):
            beside.setdefault(vote.right if vote.left == anchor else vote.left, []).append(vote)
    return tuple(
        Share(
            system=system,
            equal_or_better=_share(of, [vote.winner != anchor for vote in of]),
            better=_share(of, [vote.winner == system for vote in of]),
            both_bad=_share(of, [vote.choice == "both_bad" for vote in of]),
        )
        for system, of in sorted(beside.items())
    )


def _note(ranking: Ranking | None) -> str:
    if ranking is None:
        return NOT_ENOUGH
    words = []
    components: dict[int, list[str]] = {}
    for rating in ranking.ratings:
        components.setdefault(rating.component, []).append(rating.system)
    if len(components) > 1:
        listed = "; ".join(f"{number}: {', '.join(names)}" for number, names in components.items())
        words.append(f"no comparison links the components {listed}; there is no order between them")
    if ranking.raters == 1:
        words.append("one rater: intervals are over items and speak for that rater; agreement is not defined")
    return ". ".join(words)
