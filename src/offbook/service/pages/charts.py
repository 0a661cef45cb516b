"""Charts as inline SVG, made on the server: intervals on a shared axis, strips of trials, traces along an episode.

Pure functions of plain data. The drawing uses classes, whose colours and strokes stand in the pages' stylesheet, and
percentages, so that a chart is as wide as its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from offbook.service.pages.words import MARKS, bounds, decimals, figure, known, mark, number

Interval = Mapping[str, Any]
"""A dict with the keys value, low and high."""

_CELL, _PITCH, _TALL = 7, 9, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A value axis that all rows of a chart share.

    Attributes:
        low: value at the left edge.
        high: value at the right edge.
        ticks: values with a label.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def percent(self, value: float) -> str:
        """Where a value stands, as a percentage of the width, kept inside the chart.

        Example:
            >>> Axis(low=0.0, high=2.0, ticks=()).percent(0.5)
            '25%'
        """
        return f"{100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))):.4g}%"

    def label(self, value: float) -> str:
        """A tick's value with as many digits as tell it from its neighbours."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else self.high - self.low
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return number(value, digits + (0 if math.isclose(step * 10**digits, round(step * 10**digits)) else 1))


def axis_for(values: Iterable[float | None], *, zero: bool = False) -> Axis:
    """An axis that holds all values: exactly 0 to 1 when they are fractions, else round limits.

    Args:
        values: what will be drawn; None and non-finite values are passed over.
        zero: the axis is for differences: symmetric about zero.

    Example:
        >>> axis_for([0.2, 0.9]).ticks
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if zero:
        high = max(abs(low), abs(high), 1e-6)
        low = -high
    elif low >= 0 and high <= 1:
        return Axis(low=0.0, high=1.0, ticks=(0.0, 0.25, 0.5, 0.75, 1.0))
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks)


def _grid(axis: Axis, anchors: Sequence[Mapping[str, Any]]) -> Markup:
    """The ends of the axis and the anchors; more lines would be more to look through."""
    lines = [_line("g", axis.percent(end)) for end in (axis.low, axis.high)]
    lines += [_line(f"a a{i % 2}", axis.percent(anchor["value"])) for i, anchor in enumerate(anchors)]
    return Markup("").join(lines)


def _line(name: str, x: str) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y2="100%"/>').format(name, x, x)


def _dot(value: Interval, axis: Axis, *, shape: str = "dot", y: str = "50%") -> Markup:
    middle = axis.percent(value["value"])
    left, right = (axis.percent(value[end]) if known(value) else middle for end in ("low", "high"))
    bar = Markup('<line class="i" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, right, y, y)
    if shape == "dot":
        return bar + Markup('<circle class="d" cx="{}" cy="{}" r="4.5"/>').format(middle, y)
    # A nested svg lets a shape in pixels stand at a place in percent.
    drawing = {"square": "M-4-4H4V4H-4Z", "diamond": "M0-5.5 5.5 0 0 5.5-5.5 0Z"}[shape]
    return bar + Markup('<svg class="p" x="{}" y="{}"><path class="d {}" d="{}"/></svg>').format(
        middle, y, shape, drawing
    )


def interval_row(
    value: Interval | None,
    axis: Axis,
    anchors: Sequence[Mapping[str, Any]] = (),
    *,
    shape: str = "dot",
    label: str = "score",
) -> Markup:
    """One row: a dot with its interval over the anchors' lines, which join those of the rows around it.

    Args:
        value: the interval; None draws the anchors alone, ends that are None the dot alone.
        axis: the shared axis.
        anchors: dicts with the keys name and value, drawn as thin lines.
        shape: `"dot"`, `"square"` or `"diamond"`.
        label: what is shown, for readers who listen.

    Example:
        >>> row = interval_row({"value": 0.5, "low": 0.4, "high": 0.6}, axis_for([0, 1]))
        >>> 'aria-label="score 0.50, 95 % interval 0.40–0.60"' in row
        True
    """
    words = f"{label} {figure(value)}, 95 % interval {bounds(value)}" if value else f"{label}: no result yet"
    drawing = _dot(value, axis, shape=shape) if value else Markup("")
    return Markup('<svg class="ci" role="img" aria-label="{}">{}{}</svg>').format(words, _grid(axis, anchors), drawing)


def interval_axis(axis: Axis, anchors: Sequence[Mapping[str, Any]] = ()) -> Markup:
    """The head of a column of rows: the names of the anchors above the labels of the ticks."""
    parts = [
        Markup('<text x="{}" y="31">{}</text>').format(axis.percent(tick), axis.label(tick)) for tick in axis.ticks
    ]
    placed = sorted(anchors, key=lambda anchor: float(anchor["value"]))
    for i, anchor in enumerate(placed):
        near = [abs(other["value"] - anchor["value"]) < 0.2 * (axis.high - axis.low) for other in placed]
        # Names that would touch step apart: the left one ends, the right one starts at its line.
        side = " start" if i and near[i - 1] else " end" if near[i + 1 :][:1] == [True] else ""
        parts.append(
            Markup('<text class="an{}" x="{}" y="12">{}</text>').format(
                side, axis.percent(anchor["value"]), anchor["name"]
            )
        )
    return Markup('<svg class="axis" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def paired_row(a: float | None, b: float | None, axis: Axis, *, label: str) -> Markup:
    """One row with the values of A (dot) and B (square) joined by a line."""
    drawing = _grid(axis, ())
    if a is not None and b is not None:
        ends = [{"value": v, "low": v, "high": v} for v in (a, b)]
        drawing += Markup('<line class="join" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(
            axis.percent(a), axis.percent(b)
        )
        drawing += _dot(ends[1], axis, shape="square") + _dot(ends[0], axis)
    words = f"{label}: A {number(a)}, B {number(b)}"
    return Markup('<svg class="ci pair" role="img" aria-label="{}">{}</svg>').format(words, drawing)


def glyph(name: str, score: float | None = None) -> Markup:
    """The mark of one trial as a small drawing of its own, for cells, legends and lists; see `words.MARKS`."""
    size = f'width="{_CELL + 1}" height="{_TALL + 1}" viewBox="-.5 -.5 {_CELL + 1} {_TALL + 1}"'
    drawing = Markup('<path class="m-{}" d="{}"/>').format(*_path(name, score or 0, 0, 0))
    return Markup('<svg class="glyph" {} aria-hidden="true">{}</svg>').format(Markup(size), drawing)


_LEVELS = {"success": ("full", 6), "done": ("done", 6), "failure": ("low", _TALL - 1), "cancelled": ("gone", 6)}
"""Marks that are one level stroke, at this height: dashes in the stylesheet part a run of them into cells."""


def _path(name: str, score: float, x: float, y: float, cells: int = 1) -> tuple[str, str]:
    """The class and the path of one mark at (x, y), or of a run of equal marks that are level strokes."""
    bottom, length = y + _TALL, cells * _PITCH - (_PITCH - _CELL)
    if name in _LEVELS:
        kind, down = _LEVELS[name]
        return kind, f"M{x:g} {y + down:g}h{length}"
    if name == "partial":
        return "part", f"M{x + _CELL / 2:g} {bottom:g}V{min(bottom - 2, y + round(_TALL * (1 - score))):g}"
    if name == "policy_fault":
        return "cross", f"M{x:g} {y + 2:g}l{_CELL} 8m0-8l-{_CELL} 8"
    if name == "robot_fault":
        return "slash", f"M{x:g} {bottom:g}L{x + _CELL:g} {y:g}"
    if name == "running":
        return "run", f"M{x:g} {y + 1:g}l{_CELL} 5-{_CELL} 5Z"
    return "wait", f"M{x + 2:g} {y + 6:g}h3"


def trial_strip(trials: Sequence[Mapping[str, Any]], *, columns: int = 20) -> Markup:
    """One cell a trial, in the order of slots and filled by outcome: the same place is the same scene in every strip.

    Args:
        trials: dicts with the keys state, outcome and score.
        columns: cells in a line; long strips get wider before they get more than three lines.

    Example:
        >>> strip = trial_strip([{"state": "done", "outcome": "success", "score": 1.0}])
        >>> 'aria-label="1 trial: 1 success"' in strip
        True
    """
    columns = max(columns, math.ceil(len(trials) / 3))
    wide = max(1, min(columns, len(trials)))
    strokes: dict[str, list[str]] = {}
    names = [mark(trial) for trial in trials]
    counts = Counter(names)
    i = 0
    while i < len(names):
        # A run of equal level marks within a line is one stroke: a board holds thousands of cells.
        end, last = i + 1, min(len(names), (i // columns + 1) * columns)
        while names[i] in _LEVELS and end < last and names[end] == names[i]:
            end += 1
        x, y = i % columns * _PITCH, i // columns * (_TALL + 3)
        kind, path = _path(names[i], trials[i].get("score") or 0, x, y, end - i)
        strokes.setdefault(kind, []).append(path)
        i = end
    lines = max(1, math.ceil(len(trials) / columns))
    width, height = wide * _PITCH - 1, lines * (_TALL + 3) - 2
    parts = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in MARKS if name in counts)
    words = f"{len(trials)} trial{'' if len(trials) == 1 else 's'}: {parts or 'none yet'}"
    box = f'viewBox="-.5 -.5 {width + 1} {height + 1}" width="{min(width + 1, 200)}"'
    drawing = Markup("").join(
        Markup('<path class="m-{}" d="{}"/>').format(kind, "".join(paths)) for kind, paths in strokes.items()
    )
    return Markup('<svg class="strip" {} role="img" aria-label="{}">{}</svg>').format(Markup(box), words, drawing)


def trace(
    time: Sequence[float],
    values: Sequence[float | None],
    *,
    label: str,
    unit: str = "",
    budget: float | None = None,
    late: Sequence[bool] = (),
    steps: bool = False,
) -> Markup:
    """A quantity along an episode, with a cursor that the player moves.

    Args:
        time: seconds since reset, length T, increasing.
        values: length T; None and NaN leave a gap.
        label: what is drawn, for its title and for readers who listen.
        unit: of the values.
        budget: a limit to draw as a dashed line, such as the control period.
        late: which steps came late, length T: marked by a triangle at the top as well as by colour.
        steps: draw held values, as a reward is, and not a line between samples.
    """
    runs = _runs(time, values)
    points = [point for run in runs for point in run]
    end = max([t for t in time if math.isfinite(t)], default=0.0) or 1.0
    low, high = (min(v for _, v in points), max(v for _, v in points)) if points else (0.0, 1.0)
    low, high = min(0.0, low), max(high, budget or 0.0)
    # A little air above and below, so that a line at the limit is seen whole.
    span = (high - low) or 1.0
    low, high = low - 0.06 * span, high + 0.14 * span

    def place(t: float, v: float) -> tuple[float, float]:
        return round(1000 * t / end, 1), round(100 * (high - v) / (high - low), 1)

    path = "".join(_polyline([place(*p) for p in _thin(run, 600 * len(run) // len(points))], steps) for run in runs)
    flags = Markup("").join(
        Markup('<svg class="p" x="{:.4g}%" y="0"><path class="late" d="M-4 0H4L0 6Z"/></svg>').format(100 * t / end)
        for t, is_late in zip(time, late, strict=False)
        if is_late
    )
    levels = [0.0] if low < 0 <= high else []
    lines = [_level("g", place(0, level)[1]) for level in levels]
    if budget is not None:
        lines.append(_level("budget", place(0, budget)[1]))
    peak = max((v for _, v in points), default=None)
    most = f"at most {number(peak, 0 if (peak or 0) >= 100 else decimals(abs(peak or 0) / 10))}{unit and ' ' + unit}"
    words = f"{label}: {most if points else 'nothing was recorded'}"
    return Markup(
        '<svg class="trace" role="img" aria-label="{}" data-end="{:.6g}">'
        '<svg viewBox="0 0 1000 100" preserveAspectRatio="none" width="100%" height="100%">'
        '{}<path class="t" d="{}"/></svg>'
        '{}<line class="cursor" x1="0" x2="0" y2="100%"/></svg>'
    ).format(words, end, Markup("").join(lines), path, flags)


def _level(name: str, y: float) -> Markup:
    return Markup('<line class="{}" x2="1000" y1="{}" y2="{}"/>').format(name, y, y)


def _runs(time: Sequence[float], values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """The points in stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for t, v in zip(time, values, strict=False):
        if v is not None and math.isfinite(v):
            runs[-1].append((t, float(v)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """About `limit` points that keep the smallest and largest value of every stretch, so that no peak is lost."""
    if len(points) <= max(limit, 2):
        return points
    kept: list[tuple[float, float]] = []
    size = math.ceil(2 * len(points) / max(limit, 2))
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _polyline(places: list[tuple[float, float]], steps: bool) -> str:
    (x, y), *rest = places
    return f"M{x:g} {y:g}" + "".join(f"H{x:g}V{y:g}" if steps else f"L{x:g} {y:g}" for x, y in rest)
