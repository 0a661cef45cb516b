"""What all pages share: the frame around them, one stylesheet, words, charts, and the environment that draws templates.

An application has templates and static files of its own beside these. Pages read without scripts, bring nothing from
another host, hold no inline script or style, and escape whatever they are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.staticfiles import StaticFiles

from offbook import __version__
from offbook.service.pages import charts, words

CONTENT_SECURITY_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
ROWS_PER_PAGE = 50

_FOLDER = Path(__file__).parent
_FILTERS = (
    *("bounds", "duration", "figure", "finite", "leaders", "local", "mark", "number", "p_value", "percent"),
    *("percent_bounds", "plain", "rank", "scene_labels", "segment", "share", "state_in_words", "when"),
)

Navigation = Sequence[tuple[str, str, str]]
"""The doors at the top of each page: address, words, and the name of the page that lies behind."""


def environment(folder: Path, brand: str, navigation: Navigation) -> Environment:
    """What draws the templates of an application, and those of this folder, each with its filters and pieces.

    Args:
        folder: of its templates; its static files stand in `static/` there.
        brand: the word behind the name of the project.
        navigation: what leads from each page to the others.
    """
    made = Environment(
        loader=FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    made.filters.update({name: getattr(words, name) for name in _FILTERS}, searched=searched)
    made.globals.update(
        charts=charts, marks=words.MARKS, sheet=sheet, link=link, version=__version__, brand=brand,
        navigation=navigation, static=lambda name: static(folder, name),
    )  # fmt: skip
    return made


@cache
def static(folder: Path, name: str) -> str:
    """The address of a static file; its content's hash lets browsers keep it for good."""
    path = next(path for place in (folder, _FOLDER) if (path := place / "static" / name).exists())
    return f"/static/{name}?v={hashlib.sha256(path.read_bytes()).hexdigest()[:10]}"


def static_files(*packages: str) -> StaticFiles:
    """What serves the static files of these packages and those of all pages."""
    return StaticFiles(packages=[(name, "static") for name in (*packages, __name__)])


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
    whole = number is not None and number.isascii() and number.isdigit() and len(number) < 10
    chosen = min(count, max(1, int(number or 1))) if whole else 1
    return rows[(chosen - 1) * ROWS_PER_PAGE : chosen * ROWS_PER_PAGE], chosen, count


def searched(rows: Sequence[Mapping[str, Any]], wanted: str | None, *keys: str) -> list[Mapping[str, Any]]:
    """The rows in whose named fields every word of a search occurs; all of them where nothing is searched for."""
    if not wanted:
        return list(rows)
    return [row for row in rows if words.matches(wanted, *(row.get(key) for key in keys))]
