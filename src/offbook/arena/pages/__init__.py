"""The arena's pages: what a person sees. `render` turns a view-model (a plain dict) into HTML.

The templates stand beside this file, the stylesheet and the scripts in `static/`, served under `/static/`. Pages read
without scripts, bring nothing from another host, hold no inline script or style, and escape whatever they are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from offbook import __version__
from offbook.arena import charts
from offbook.arena.pages import words

STATIC_DIR = Path(__file__).parent / "static"
CONTENT_SECURITY_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
ROWS_PER_PAGE = 50


def render(name: str, view: Mapping[str, Any], **context: Any) -> str:
    """Draws one page.

    Args:
        name: of the template, such as `"leaderboard"`.
        view: the page's view-model; a key that the page needs and the view lacks raises `jinja2.UndefinedError`.
        context: `query`, the mapping of the request's query string, in which the pages keep their filters; it may be
            left out.

    Example:
        >>> page = render("error", {"status": 404, "error": "not found", "detail": "no run <7>", "hint": ""})
        >>> "no run &lt;7&gt;" in page
        True
    """
    query = {key: str(value) for key, value in dict(context.pop("query", None) or {}).items()}
    return _environment().get_template(f"{name}.html").render(view=view, page=name, query=query, **context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters.update(
        {name: getattr(words, name) for name in _FILTERS},
        bands=bands,
        entry_record=entry_record,
        by_difference=by_difference,
        by_scene=by_scene,
        faults_first=faults_first,
        marked=marked,
        present=present,
        searched=searched,
    )
    environment.globals.update(
        charts=charts, marks=words.MARKS, static=_static, sheet=sheet, link=link, version=__version__
    )
    return environment


_FILTERS = (
    *("bounds", "duration", "figure", "finite", "leaders", "local", "mark", "number", "p_value", "percent"),
    *("percent_bounds", "plain", "rank", "scene_labels", "segment", "share", "state_in_words", "when"),
)


@cache
def _static(name: str) -> str:
    """The address of a static file; its content's hash lets browsers keep it for good."""
    digest = hashlib.sha256((STATIC_DIR / name).read_bytes()).hexdigest()[:10]
    return f"/static/{name}?v={digest}"


def link(path: str, **query: object) -> str:
    """A path with a query string, without the parameters that are None or empty.

    Example:
        >>> link("/benchmarks/pour", split="seen", q="", page=None)
        '/benchmarks/pour?split=seen'
    """
    wanted = {key: value for key, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(wanted)}" if wanted else path


def sheet(rows: Sequence[Any], number: str | None) -> tuple[Sequence[Any], int, int]:
    """One sheet of at most 50 rows: the rows, the sheet's number and the count of sheets."""
    count = max(1, -(-len(rows) // ROWS_PER_PAGE))
    chosen = min(count, max(1, int(number))) if number and number.isascii() and number.isdigit() else 1
    return rows[(chosen - 1) * ROWS_PER_PAGE : chosen * ROWS_PER_PAGE], chosen, count


def searched(rows: Sequence[Mapping[str, Any]], wanted: str | None, *keys: str) -> list[Mapping[str, Any]]:
    """The rows in whose named fields every word of a search occurs."""
    return [row for row in rows if words.matches(wanted, *(row.get(key) for key in keys))]


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
