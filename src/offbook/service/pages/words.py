"""What the pages say in words and figures: times, durations, digits that an interval supports, states of a trial."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"

# One mark for each thing that can have become of a trial, with the words of the legend beside the chart.
MARKS = {
    "success": "success",
    "partial": "part of it (as high as its score)",
    "failure": "failure",
    "done": "done, score only",
    "policy_fault": "policy fault: counts against it",
    "robot_fault": "robot fault: runs again",
    "running": "running",
    "queued": "queued",
    "cancelled": "cancelled",
}
_FAULTS = {
    "policy_fault": "policy_fault",
    "robot_fault": "robot_fault",
    "needs_human": "robot_fault",
    "needs_storage": "robot_fault",
    "cancelled": "cancelled",
    "running": "running",
    "leased": "queued",
    "queued": "queued",
}
_STATE_WORDS = {
    "queued": "queued",
    "leased": "a robot is getting ready",
    "running": "running",
    "done": "done",
    "failure": "failure",
    "policy_fault": "policy fault",
    "robot_fault": "robot fault, will be run again",
    "needs_human": "robot fault three times over, waits for its operator",
    "needs_storage": "paused, the arena's disk is full",
    "cancelled": "cancelled",
    "idle": "idle, waiting for work",
    "offline": "offline: no heartbeat",
    "stopped": "stopped by its operator",
}


def mark(trial: Mapping[str, Any]) -> str:
    """Which of `MARKS` stands for a trial with the keys state, outcome and score.

    Example:
        >>> mark({"state": "done", "outcome": "failure", "score": 0.4})
        'partial'
    """
    for word in (trial.get("outcome"), trial.get("state")):
        if word in _FAULTS:
            return _FAULTS[word]
    if trial.get("outcome") == "success" or trial.get("success"):
        return "success"
    if trial.get("outcome") != "failure" and trial.get("success") is None:
        return "done"
    return "partial" if 0 < (trial.get("score") or 0) < 1 else "failure"


def state_in_words(trial: Mapping[str, Any], scored: bool = True) -> str:
    """A trial's or robot's state as a sentence, with the reason of a fault and, if `scored`, the score.

    Example:
        >>> state_in_words({"state": "policy_fault", "fault": "action 17 at step 83 was NaN"})
        'policy fault: action 17 at step 83 was NaN'
    """
    state = str(trial.get("state") or "unknown")
    outcome = str(trial.get("outcome") or state)
    if state == "done" and trial.get("success") is not None and outcome not in _FAULTS:
        outcome = "success" if trial["success"] else "failure"
    word = _STATE_WORDS.get(outcome if outcome in _FAULTS or state == "done" else state, outcome)
    if trial.get("fault"):
        return f"{word}: {trial['fault']}"
    if scored and trial.get("score") is not None and outcome not in _FAULTS:
        return f"{word}, score {trial['score']:.2f}"
    return word


def decimals(half_width: float) -> int:
    """Digits after the point that an interval of this half width supports, as the Particle Data Group rounds.

    Two significant digits of the half width when they are 10 to 35, else one; Source: Review of Particle Physics,
    introduction, "Rounding".

    Example:
        >>> decimals(0.13), decimals(0.04), decimals(0.4)
        (2, 2, 1)
    """
    if not math.isfinite(half_width) or half_width <= 0:
        return 2
    place = math.floor(math.log10(half_width))
    leading = half_width / 10**place
    return max(0, -place + (1 if leading < 3.55 else 0))


def known(interval: Mapping[str, Any] | None) -> bool:
    """Whether an interval has ends; that of a single trial has none."""
    return interval is not None and interval["low"] is not None and interval["high"] is not None


def _digits(interval: Mapping[str, Any]) -> int:
    return min(6, decimals((interval["high"] - interval["low"]) / 2)) if known(interval) else 2


def number(value: float | None, digits: int = 2) -> str:
    """A number with a true minus sign and never minus zero; a dash for what is not known.

    Example:
        >>> number(3.14159, 1), number(-0.0001), number(None)
        ('3.1', '0.00', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def figure(interval: Mapping[str, Any] | None) -> str:
    """The value of an interval with no more digits than it supports.

    Example:
        >>> figure({"value": 0.61834, "low": 0.473, "high": 0.752})
        '0.62'
    """
    return DASH if interval is None else number(interval["value"], _digits(interval))


def bounds(interval: Mapping[str, Any] | None) -> str:
    """The ends of an interval with the digits of its value.

    Example:
        >>> bounds({"value": 0.61834, "low": 0.473, "high": 0.752})
        '0.47–0.75'
    """
    if interval is None:
        return "no result yet"
    if not known(interval):
        return "no interval: too few or equal scores"
    digits = _digits(interval)
    low, high = number(interval["low"], digits), number(interval["high"], digits)
    return f"{low} to {high}" if MINUS in low else f"{low}{DASH}{high}"


def percent(interval: Mapping[str, Any] | None) -> str:
    """The value of a rate as a percentage."""
    return DASH if interval is None else f"{number(100 * interval['value'], max(0, _digits(interval) - 2))}{THIN}%"


def percent_bounds(interval: Mapping[str, Any] | None) -> str:
    """The ends of a rate's interval as percentages."""
    if interval is None or not known(interval):
        return ""
    digits = max(0, _digits(interval) - 2)
    return f"{number(100 * interval['low'], digits)}{DASH}{number(100 * interval['high'], digits)}{THIN}%"


def share(value: float | None) -> str:
    """A small share as a percentage, such as that of late steps."""
    return DASH if value is None else f"{number(100 * value, 1 if 0 < value < 0.1 else 0)}{THIN}%"


def p_value(p: float | None) -> str:
    """A p-value as papers print it.

    Example:
        >>> p_value(0.00004), p_value(0.0312)
        ('< 0.001', '= 0.031')
    """
    if p is None:
        return f"= {DASH}"
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def rank(row: Mapping[str, Any]) -> str:
    """A rank, or the range in which it lies until the intervals part.

    Example:
        >>> rank({"rank": [2, 4]}), rank({"rank": [1, 1]})
        ('2–4', '1')
    """
    if row.get("anchor") or not row.get("rank"):
        return ""
    low, high = row["rank"]
    return str(low) if low == high else f"{low}{DASH}{high}"


def duration(seconds: float | None) -> str:
    """A length of time in its two largest units.

    Example:
        >>> duration(42), duration(250), duration(7800), duration(200_000)
        ('42 s', '4 min', '2 h 10 min', '2 days 7 h')
    """
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.95 and seconds != round(seconds):
        return f"{max(0.0, seconds):.1f} s"
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


def moment(time: str | float | datetime | None) -> datetime | None:
    """An instant given as an ISO string, seconds since 1970 or a datetime; without a zone it is UTC."""
    if time is None or time == "":
        return None
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    elif isinstance(time, int | float):
        time = datetime.fromtimestamp(time, UTC)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def when(time: str | float | datetime | None, style: str = "minute") -> Markup:
    """A `<time>` element: UTC here, turned into the reader's zone by the page's script; the exact UTC is its title.

    Args:
        time: the instant.
        style: `"minute"`, `"second"` or `"day"`.
    """
    at = moment(time)
    if at is None:
        return Markup(DASH)
    form = {"day": "%d %b %Y", "minute": "%d %b %Y, %H:%M UTC", "second": "%H:%M:%S UTC"}[style]
    return Markup('<time datetime="{}" title="{}" data-style="{}">{}</time>').format(
        at.strftime("%Y-%m-%dT%H:%M:%SZ"), at.strftime("%Y-%m-%d %H:%M:%S UTC"), style, at.strftime(form).lstrip("0")
    )


def scene_labels(rows: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """A few words for the scene of each slot: its name or, of its parameters, the first that differ between the scenes.

    Args:
        rows: dicts with the keys slot and scene (a name or a record of parameters).

    Example:
        >>> scene_labels([{"slot": 0, "scene": {"x": 1, "cup": 3}}, {"slot": 1, "scene": {"x": 2, "cup": 3}}])
        {0: 'x 1', 1: 'x 2'}
    """
    scenes = {row["slot"]: row["scene"] for row in rows}
    records = [scene for scene in scenes.values() if isinstance(scene, Mapping)]
    keys = dict.fromkeys(key for record in records for key in record)
    telling = [key for key in keys if len({plain(record.get(key)) for record in records}) > 1]
    labels = {}
    for slot, scene in scenes.items():
        if isinstance(scene, Mapping):
            parts = [f"{str(key).replace('_', ' ')} {plain(scene.get(key))}" for key in telling]
            name = scene.get("name") or ", ".join(parts[:2]) + (", …" if len(parts) > 2 else "")
        else:
            name = scene or f"scene {slot}, shown when it was played"
        labels[slot] = str(name) if name else f"scene {slot}"
    return labels


def plain(value: object) -> str:
    """A value of a scene or a setting: short numbers, lists without brackets."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: DASH}[value]
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    return str(value)


def segment(name: object) -> str:
    """A name made fit to stand between two slashes of a path."""
    return quote(str(name), safe="")


def local(url: str | None) -> str:
    """An address on this host or, for blobs kept elsewhere, https; all else (`javascript:`, `//host`) becomes `#`."""
    text = str(url or "")
    fine = text.startswith(("https://", "#")) or (text.startswith("/") and text[1:2] not in {"/", "\\"})
    return text if fine else "#"


def finite(value: Any) -> Any:
    """The same plain data with None for NaN and infinity, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def matches(wanted: str | None, *texts: object) -> bool:
    """Whether every word of a search occurs in one of the texts."""
    haystack = " ".join(str(text) for text in texts if text is not None).casefold()
    return all(word in haystack for word in (wanted or "").casefold().split())


def leaders(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that may yet be first: those whose rank range begins at 1."""
    return [row for row in rows if not row.get("anchor") and row.get("rank") and row["rank"][0] == 1]
