"""The arena's pages: what a person sees. `render` turns a view-model (a plain dict) into HTML.

The templates stand beside this file; the frame around them, the stylesheet and common pieces in `service.pages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment

from offbook.service.pages import environment, words

BRAND = "arena"
NAVIGATION = (
    ("/", "Benchmarks", "index"),
    ("/queue", "Queue", "queue"),
    ("/studies", "Studies", "studies"),
    ("/submit", "Take part", "submit"),
)

_FILTERS = frozenset({"a", "b", "split", "q", "page", "show", "slot"})


def render(name: str, view: Mapping[str, Any], **context: Any) -> str:
    """Draws one page.

    Args:
        name: of the template, such as `"leaderboard"`.
        view: the page's view-model; a key that the page needs and the view lacks raises `jinja2.UndefinedError`.
        context: `query`, the mapping of the request's query string, in which the pages keep their filters, and of which
            they repeat nothing else: a token may have been put there by mistake. It may be left out.

    Example:
        >>> page = render("error", {"status": 404, "error": "not found", "detail": "no run <7>", "hint": ""})
        >>> "no run &lt;7&gt;" in page
        True
    """
    asked = dict(context.pop("query", None) or {})
    query = {key: str(value) for key, value in asked.items() if key in _FILTERS}
    return _environment().get_template(f"{name}.html").render(view=view, page=name, query=query, **context)


@cache
def _environment() -> Environment:
    made = environment(Path(__file__).parent, BRAND, NAVIGATION)
    made.filters.update(
        bands=bands,
        entry_record=entry_record,
        by_difference=by_difference,
        by_scene=by_scene,
        faults_first=faults_first,
        marked=marked,
        present=present,
    )
    return made


def bands(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Neighbouring rows that share a rank range, which no result so far tells apart."""
    for _, band in groupby(rows, key=lambda row: (words.rank(row), bool(row.get("anchor")))):
        yield list(band)


def entry_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of a leaderboard as a flat record, which is what a reader copies as CSV or JSON."""
    kept = ("submission", "name", "owner", "kind", "method", "imitates", "n", "latency_ms", "late_share", "date")
    record: dict[str, Any] = {key: row[key] for key in kept}
    record |= zip(("rank_low", "rank_high"), row.get("rank") or (None, None), strict=True)
    for name in ("score", "success"):
        interval = row[name] or {"value": None, "low": None, "high": None}
        record |= {name: interval["value"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) and key != "date" else value
        for key, value in record.items()
    }


def by_difference(scenes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Scenes, those where two policies differ most first."""
    return sorted(scenes, key=lambda scene: -abs(scene.get("difference") or 0.0))


def faults_first(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Trials with the faults of the policy, then those of robots, then the rest from the lowest score up."""
    order = {
        name: i for i, name in enumerate(("policy_fault", "robot_fault", "running", "failure", "partial", "success"))
    }
    return sorted(trials, key=lambda trial: (order.get(words.mark(trial), 9), trial.get("score") or 0.0, trial["slot"]))


def marked(trials: Sequence[Mapping[str, Any]], *names: str) -> list[Mapping[str, Any]]:
    """The trials that bear one of these marks."""
    return [trial for trial in trials if words.mark(trial) in names]


def present(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """The marks that occur, in the order of the legend."""
    found = {words.mark(trial) for trial in trials}
    return [name for name in words.MARKS if name in found]


def by_scene(trials: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Trials grouped by scene in the order of slots; one nameless group when hardly any scene comes twice."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    labels = words.scene_labels(trials)
    for trial in sorted(trials, key=lambda trial: trial["slot"]):
        groups.setdefault(labels[trial["slot"]], []).append(trial)
    return list(groups.items()) if 2 * len(groups) <= len(trials) else [("", [t for g in groups.values() for t in g])]
