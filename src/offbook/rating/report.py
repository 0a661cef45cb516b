"""An analysis as tables for people, and as a picture: a dot for each system, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offbook.errors import DataError, needs_extra
from offbook.evaluate.stats import Interval
from offbook.rating.analysis import Analysis, Group
from offbook.rating.ranking import Ranking
from offbook.runs.directory import atomic_path

_MOST_DRAWN = 200
_COLOURS = ("#0072b2", "#d55e00")  # Okabe and Ito's, told apart by all


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a report.

    Attributes:
        title: a line above it.
        head: names of the columns.
        rows: cells; may be empty, where the title says all.
    """

    title: str
    head: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()


def tables(analysis: Analysis) -> list[Table]:
    """The analysis as tables, in the order in which they are to be read.

    Example:
        >>> [table.title for table in tables(Analysis(study="", votes=0, groups=(), between=()))]
        ['not enough data: no votes']
    """
    if not analysis.groups:
        return [Table(title="not enough data: no votes")]
    found = [table for group in analysis.groups for table in _group_tables(group)]
    rows = tuple((f"{of.first} and {of.second}", _text(of.agreement)) for of in analysis.between)
    return found + (
        [Table(title="agreement between kinds of raters", head=("kinds", "agree"), rows=rows)] if rows else []
    )


def _group_tables(group: Group) -> list[Table]:
    which = ", excluded ones included" if group.with_excluded else ""
    parts = [f"{group.votes} votes{which}", f"{group.skips} skipped"]
    if group.excluded:
        parts.append("excluded by rule: " + ", ".join(f"{rule} {count}" for rule, count in group.excluded.items()))
    found = [Table(title=f"{group.kind} raters: {'; '.join(parts)}{'. ' if group.note else ''}{group.note}")]
    for ranking, what in ((group.ranking, "ratings"), (group.controlled, "ratings, style controlled for")):
        if ranking is not None:
            found += _ranking_tables(ranking, what)
    if group.shares:
        head = ("system", "equal or better", "better", "both bad")
        rows = tuple((of.system, *map(_text, (of.equal_or_better, of.better, of.both_bad))) for of in group.shares)
        anchor = group.ranking.anchor if group.ranking else None
        found.append(Table(title=f"share of votes beside {anchor}", head=head, rows=rows))
    found.append(_trust(group))
    # The signs of raters are of all their votes and need no second showing.
    return found if group.with_excluded else [*found, _raters(group)]


def _ranking_tables(ranking: Ranking, what: str) -> list[Table]:
    first = 0 if ranking.ratings[-1].component > 1 else 1
    head = ("component", "rank", "system", "rating", "ranks", "wins", "ties", "both bad", "losses")[first:]
    rows = tuple(
        (of.component, of.rank, of.system, _text(of.theta), _ranks(of.ranks), of.wins, of.ties, of.both_bad, of.losses)
        for of in ranking.ratings
    )
    zero = f"0 is {ranking.anchor}" if ranking.anchor else "0 is the mean"
    title = (
        f"{what} in log-odds, {zero}; {ranking.votes} votes of {ranking.raters} raters on {ranking.items} items; "
        f"{ranking.method}"
    )
    found = [Table(title=title, head=head, rows=tuple(row[first:] for row in rows))]
    if ranking.steps:
        steps = tuple(
            (f"{of.better} > {of.worse}", _text(of.difference), _count(of.votes), _count(of.raters))
            for of in ranking.steps
        )
        title = "at most how many votes, or raters, turn an order when left out (-: no number of them)"
        found.append(Table(title=title, head=("order", "difference", "votes", "raters"), rows=steps))
    terms = tuple((of.name, _text(of.value), _p(of.p_value)) for of in (ranking.left, *ranking.style))
    found.append(
        Table(title=f"what else decides; ties {ranking.nu:.3g} (nu)", head=("term", "log-odds", "p"), rows=terms)
    )
    return found


def _trust(group: Group) -> Table:
    agreed = group.agreement
    rows = [
        ("both bad", _text(group.both_bad)),
        (f"raw agreement, {agreed.pairs} pairs", _text(agreed.raw)),
        ("Krippendorff's alpha", _text(agreed.alpha)),
        *((f"alpha of reason {name!r}", _text(alpha)) for name, alpha in agreed.reasons.items()),
        ("same answer to a repeat", _text(group.consistency)),
        ("gold pairs failed", _text(group.gold_failures)),
    ]
    title = f"how far to trust the answers{f'; agreement by {agreed.raw.method}' if agreed.raw else ''}"
    return Table(title=title, head=("figure", "value"), rows=tuple(rows))


def _raters(group: Group) -> Table:
    head = ("rater", "votes", "gold failed", "same again", "median s", "hasty", "left", "streak p", "fit z", "excluded")
    rows = tuple(
        (
            of.rater,
            of.votes,
            f"{of.gold_failures}/{of.gold}",
            f"{of.consistent}/{of.repeats}",
            "-" if of.dwell_ms is None else f"{of.dwell_ms / 1000:.1f}",
            _count(of.hasty),
            "-" if of.left_share is None else f"{of.left_share:.2f}",
            _p(of.streak_p),
            "-" if of.fit_z is None else f"{of.fit_z:.1f}",
            ", ".join(of.excluded) or "-",
        )
        for of in group.quality
    )
    return Table(title="raters", head=head, rows=rows)


def _text(interval: Interval | None) -> str:
    """A value with its ends, to two digits behind the point.

    Example:
        >>> _text(Interval(value=0.5, low=-0.25, high=1.25, n=9, method="")), _text(None)
        ('0.50 [-0.25, 1.25]', 'n/a')
    """
    if interval is None:
        return "n/a"
    known = math.isfinite(interval.low)
    return f"{interval.value:.2f} [{f'{interval.low:.2f}, {interval.high:.2f}' if known else 'unknown'}]"


def _ranks(ranks: tuple[int, int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]}-{ranks[1]}"


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _p(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"


def draw_ratings(path: Path, analysis: Analysis) -> None:
    """Draws the ratings of the votes that count, a panel for each kind of raters; of very many systems the best.

    Args:
        path: a PNG file, replaced atomically.
        analysis: of votes some of which count.

    Raises:
        DataError: there is no ranking to draw.
    """
    with needs_extra("models"):
        from matplotlib.figure import Figure
    panels = [group for group in analysis.groups if group.ranking is not None and not group.with_excluded]
    if not panels:
        fix = "collect votes first"
        raise DataError(f"ratings of {analysis.study!r}", expected="a ranking to draw", got="none", fix=fix)
    most = min(_MOST_DRAWN, max(len(group.ranking.ratings) for group in panels if group.ranking is not None))
    figure = Figure(figsize=(1.5 + 4.2 * len(panels), 1.6 + 0.45 * most), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_group(axes, group)
    # A dollar sign in a name is no formula.
    figure.suptitle(f"{analysis.study}: ratings with 95% interval", fontsize=10, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_group(axes: Any, group: Group) -> None:
    named = {"as voted": group.ranking, "style controlled for": group.controlled}
    rankings = {name: ranking for name, ranking in named.items() if ranking is not None}
    places: dict[str, int] = {}
    for number, (name, ranking) in enumerate(rankings.items()):
        places = places or {of.system: place for place, of in enumerate(ranking.ratings[:_MOST_DRAWN])}
        drawn = [of for of in ranking.ratings if of.system in places]
        rows = [places[of.system] + 0.24 * (number - (len(rankings) - 1) / 2) for of in drawn]
        values = [of.theta.value for of in drawn]
        # An interval that is not known is not drawn.
        halves = [of.theta.high - of.theta.value if math.isfinite(of.theta.high) else 0.0 for of in drawn]
        dots = {"fmt": "o", "color": _COLOURS[number], "markeredgecolor": "white", "markersize": 8}
        axes.errorbar(values, rows, xerr=halves, elinewidth=3, label=name, **dots)
    axes.set(xlabel=f"log-odds, by {group.kind} raters", ylim=(len(places) - 0.4, -0.6))
    axes.set_yticks(range(len(places)), list(places), parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(rankings) > 1:
        axes.legend(frameon=False, fontsize=8)
