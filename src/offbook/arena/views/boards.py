"""Who is better: the list of benchmarks, leaderboards, and two submissions side by side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from offbook.arena.standing import mean_difference, success_interval, successes
from offbook.arena.submissions import find_benchmark, find_split, robot_spec
from offbook.arena.tables import Benchmark, Result, Split, Submission, Trial, User
from offbook.evaluate.stats import mcnemar_exact
from offbook.service.database import now
from offbook.service.pages import searched, sheet
from offbook.service.refusal import RefusedError, unknown

SEARCHED = ("name", "owner", "method", "kind", "imitates")


def interval(value: float | None, low: float | None, high: float | None) -> dict[str, Any] | None:
    """An interval as the pages take it, None when there is no value."""
    return None if value is None else {"value": value, "low": low, "high": high}


def benchmark_view(session: Session, benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark with the names of its splits."""
    splits = session.scalars(select(Split.name).where(Split.benchmark_id == benchmark.id).order_by(Split.id)).all()
    return {
        "name": benchmark.name,
        "version": benchmark.version,
        "title": benchmark.title,
        "task": benchmark.task,
        "metric": benchmark.metric,
        "range": None if benchmark.least is None else [benchmark.least, benchmark.most],
        "robot": benchmark.robot_class,
        "prestage": {"name": benchmark.prestage, "score": benchmark.prestage_score} if benchmark.prestage else None,
        "splits": list(splits),
    }


def anchors(session: Session, split_id: int) -> list[dict[str, Any]]:
    """The scores of the newest expert and random submissions, between which all others are read."""
    rows = session.execute(
        select(Submission.anchor, Submission.score)
        .where(Submission.split_id == split_id, Submission.anchor.is_not(None), Submission.score.is_not(None))
        .order_by(Submission.id)
    )
    newest = {row.anchor: row.score for row in rows}
    return [{"name": name, "value": newest[name]} for name in ("random", "expert") if name in newest]


def index(session: Session) -> dict[str, Any]:
    """All benchmarks in their newest version, each with what was done on it and who leads its first split."""
    newest = select(func.max(Benchmark.id)).group_by(Benchmark.name)
    views = []
    for benchmark in session.scalars(select(Benchmark).where(Benchmark.id.in_(newest)).order_by(Benchmark.name)):
        splits = session.scalars(select(Split).where(Split.benchmark_id == benchmark.id).order_by(Split.id)).all()
        entries, done = session.execute(
            select(func.count(Submission.id), func.coalesce(func.sum(Submission.n), 0)).where(
                Submission.split_id.in_([split.id for split in splits]), Submission.anchor.is_(None)
            )
        ).one()
        first = session.scalars(
            select(Submission)
            .where(Submission.split_id == splits[0].id, Submission.anchor.is_(None))
            .where(Submission.n >= len(splits[0].cases), Submission.score.is_not(None))
            .order_by(Submission.score.desc())
            .limit(1)
        ).one_or_none()
        leader = None
        if first is not None:
            score = interval(first.score, first.score_low, first.score_high)
            leader = {"submission": str(first.id), "name": first.name, "score": score}
        views.append(
            benchmark_view(session, benchmark)
            | {"entries": entries, "trials_done": done, "leader": leader, "anchors": anchors(session, splits[0].id)}
        )
    return {"benchmarks": views, "generated": session.scalar(select(now(session)))}


def leaderboard(
    session: Session,
    name: str,
    split_name: str | None = None,
    *,
    shown: tuple[str | None, str | None] | None = None,
) -> dict[str, Any]:
    """All submissions on one split with their intervals and, on the whole split, the ranks that these allow.

    Args:
        session: any session.
        name: of the benchmark.
        split_name: of the split; the first when None.
        shown: the search words and the sheet of the page; only the rows that it shows get their list of trials.

    Raises:
        RefusedError: 404, no such benchmark or split.
    """
    benchmark = find_benchmark(session, name)
    split = find_split(session, benchmark, split_name)
    rows = _standings(session, split)
    if shown is not None:
        words, number = shown
        on_sheet = sheet(searched(rows, words, *SEARCHED), number)[0]
        strips = _strips(session, [int(row["submission"]) for row in on_sheet])
        # A page shows fifty of what may be ten thousand rows: the others stay as they are remembered.
        shown_trials = {row["submission"]: strips.get(int(row["submission"]), []) for row in on_sheet}
        rows = [
            row | {"trials": shown_trials[row["submission"]]} if row["submission"] in shown_trials else row
            for row in rows
        ]
    return {
        "benchmark": benchmark_view(session, benchmark),
        "split": split.name,
        "rows": rows,
        "anchors": anchors(session, split.id),
        "generated": session.scalar(select(now(session))),
        "command": f"offbook arena status --benchmark {benchmark.name} --split {split.name}",
    }


_remembered: OrderedDict[tuple[Any, ...], list[dict[str, Any]]] = OrderedDict()


def _standings(session: Session, split: Split) -> list[dict[str, Any]]:
    """The rows of a split, best first, remembered until a submission or a result is added or one is withdrawn."""
    counts = session.execute(
        select(
            func.count(Submission.id),
            func.max(Submission.id),
            func.sum(Submission.n),
            func.sum(case((Submission.state == "cancelled", 1), else_=0)),
        ).where(Submission.split_id == split.id)
    ).one()
    key = (session.get_bind().engine.url, split.id, *counts)
    if key not in _remembered:
        _remembered[key] = _read_standings(session, split.id, len(split.cases))
    _remembered.move_to_end(key)
    while len(_remembered) > 16:
        _remembered.popitem(last=False)
    return _remembered[key]


def _read_standings(session: Session, split_id: int, whole: int) -> list[dict[str, Any]]:
    # Who has not met the whole split stands below who has, and has no rank: fewer scenes are an easier choice of them.
    found = session.execute(
        select(
            Submission.id, Submission.name, User.name, Submission.kind, Submission.method, Submission.imitates,
            Submission.created, Submission.anchor, Submission.n, Submission.score,
            Submission.score_low, Submission.score_high, Submission.successes, Submission.judged,
            Submission.latency_ms, Submission.late_share,
        )
        .join(User, User.id == Submission.user_id)
        .where(Submission.split_id == split_id, (Submission.state != "cancelled") | (Submission.n > 0))
        .order_by(Submission.n < whole, Submission.score.desc().nulls_last(), Submission.id)
    )  # fmt: skip
    rows = [
        {
            "submission": str(entry),
            "name": name,
            "owner": owner,
            "kind": kind,
            "method": method,
            "imitates": imitates,
            "date": created,
            "anchor": anchor,
            "n": n,
            "wanted": whole,
            "score": interval(score, low, high),
            "success": _success(successes, judged) if judged else None,
            "rank": None,
            "latency_ms": latency_ms,
            "late_share": late_share,
        }
        for entry, name, owner, kind, method, imitates, created, anchor, n, score, low, high, successes,
        judged, latency_ms, late_share in found
    ]  # fmt: skip
    _rank([row for row in rows if row["anchor"] is None and row["n"] >= whole])
    return rows


@lru_cache(maxsize=10_000)
def _success(successes: int, n: int) -> dict[str, Any]:
    found = success_interval(successes, n)
    return {"value": found.value, "low": found.low, "high": found.high}


def _rank(rows: Sequence[dict[str, Any]]) -> None:
    """Gives each row the places that it may hold: better than it are those whose whole interval lies above its own."""
    scores = [row["score"] for row in rows]
    lows = np.array([-np.inf if score["low"] is None else score["low"] for score in scores])
    highs = np.array([np.inf if score["high"] is None else score["high"] for score in scores])
    above = len(rows) - np.searchsorted(np.sort(lows), highs, side="right")
    below = np.searchsorted(np.sort(highs), lows, side="left")
    for row, better, worse in zip(rows, above.tolist(), below.tolist(), strict=True):
        row["rank"] = [1 + better, len(rows) - worse]


def trial_outcome(state: str, faults: int, success: bool | None) -> str | None:
    """What became of a trial, in one word for the charts; None while it is open."""
    if state == "done":
        return "done" if success is None else "success" if success else "failure"
    if state == "policy_fault":
        return state
    return "robot_fault" if faults and state == "queued" else None


def _strips(session: Session, entries: Collection[int]) -> dict[int, list[dict[str, Any]]]:
    rows = session.execute(
        select(Trial.submission_id, Trial.id, Trial.slot, Trial.state, Trial.faults, Result.success, Result.score)
        .outerjoin(Result, Result.trial_id == Trial.id)
        .where(Trial.submission_id.in_(entries))
        .order_by(Trial.submission_id, Trial.slot)
    )
    strips: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        outcome = trial_outcome(row.state, row.faults, row.success)
        cell = {"id": row.id, "slot": row.slot, "state": row.state, "outcome": outcome, "score": row.score}
        strips.setdefault(row.submission_id, []).append(cell)
    return strips


def paired(session: Session, first: int, second: int) -> tuple[Submission, Submission]:
    """Two submissions that met the same scenes.

    Raises:
        RefusedError: 404, an unknown submission; 422, they did not meet the same scenes.
    """
    a, b = (session.get(Submission, entry) for entry in (first, second))
    if a is None or b is None:
        raise unknown("submission", first if a is None else second, "choose two rows of a leaderboard")
    if a.split_id != b.split_id or a.id == b.id:
        raise RefusedError(
            422,
            "not_paired",
            f"submissions {first} and {second}",
            expected="two different ones on the same split",
            got="one and the same" if a.id == b.id else "two different splits",
            fix="choose two rows of one leaderboard",
        )
    return a, b


def compare(session: Session, first: int, second: int) -> dict[str, Any]:
    """Two submissions of one split, scene by scene: the paired difference and the exact test of their successes.

    Raises:
        RefusedError: as of `paired`.
    """
    a, b = paired(session, first, second)
    sides = [results(session, entry.id) for entry in (a, b)]
    scenes = [_scene(case, sides[0].get(slot), sides[1].get(slot), slot) for slot, case in enumerate(a.split.cases)]
    scenes = [scene for scene in scenes if scene["a"] is not None or scene["b"] is not None]
    both = sorted(sides[0].keys() & sides[1].keys())
    difference = None
    if both:
        ours, theirs = ([side[slot].score for slot in both] for side in sides)
        difference = mean_difference(ours, theirs, a.split.benchmark)
    known = [dict(zip(side, successes(side.values()), strict=True)) for side in sides]
    pairs = [(known[0][slot], known[1][slot]) for slot in both]
    judged = [(x, y) for x, y in pairs if x is not None and y is not None]
    p = mcnemar_exact(sum(x and not y for x, y in judged), sum(y and not x for x, y in judged)) if judged else None
    return {
        "a": {"submission": str(a.id), "name": a.name},
        "b": {"submission": str(b.id), "name": b.name},
        "benchmark": benchmark_view(session, a.split.benchmark),
        "split": a.split.name,
        "pairs": len(both),
        "difference": difference,
        "mcnemar_p": p,
        "rate_hz": robot_spec(session, a.robot_class).get("rate_hz"),
        "scenes": scenes,
        "generated": session.scalar(select(now(session))),
        "command": f"offbook arena status {a.id} --compare {b.id}",
    }


def results(session: Session, entry: int) -> dict[int, Any]:
    """By slot, the trial of a submission and what came of it."""
    rows = session.execute(
        select(Trial.slot, Trial.id, Result.score, Result.success, Result.outcome, Result.files)
        .join(Result, Result.trial_id == Trial.id)
        .where(Trial.submission_id == entry)
    )
    return {row.slot: row for row in rows}


def _scene(case: dict[str, Any], a: Any, b: Any, slot: int) -> dict[str, Any]:
    films = {side: videos(row.files)[:1] for side, row in (("a", a), ("b", b)) if row is not None}
    return {
        "scene": case["scene"],
        "slot": slot,
        "a": None if a is None else a.score,
        "b": None if b is None else b.score,
        "difference": None if a is None or b is None else a.score - b.score,
        "trials": {side: row.id for side, row in (("a", a), ("b", b)) if row is not None},
        "videos": {side: film[0] for side, film in films.items() if film},
    }


def videos(files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The films among a result's files, each with its poster when there is one."""
    posters = {file["name"]: file["sha256"] for file in files if file["media_type"] == "image/jpeg"}
    films = []
    for file in files:
        if file["media_type"] == "video/mp4":
            camera = file["name"].removeprefix("video-").removesuffix(".mp4")
            poster = posters.get(f"poster-{camera}.jpg")
            films.append(
                {
                    "camera": camera,
                    "url": f"/v1/blobs/{file['sha256']}",
                    "poster": f"/v1/blobs/{poster}" if poster else None,
                }
            )
    return films
