"""What happened to mine: one submission, and one run of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from offbook.arena.recordings import MANIFEST
from offbook.arena.standing import success_interval
from offbook.arena.submissions import used_today
from offbook.arena.tables import FINAL, IN_FLIGHT, Attempt, Event, Result, Robot, Submission, Trial, Worker
from offbook.arena.views.boards import anchors, benchmark_view, interval, trial_outcome, videos
from offbook.arena.views.robots import ALIVE_SECONDS, positions
from offbook.service.database import now
from offbook.service.refusal import RefusedError, unknown
from offbook.service.storage import BlobStore

_MANIFEST_BYTES = 4 * 2**20


def submission(session: Session, entry: int, present: Collection[int], base_url: str) -> dict[str, Any]:
    """Everything about one submission.

    Args:
        session: any session.
        entry: its id.
        present: submissions whose policies are connected now.
        base_url: the arena's address, for the command that connects the policy.

    Raises:
        RefusedError: 404, no such submission.
    """
    found = session.get(Submission, entry)
    if found is None:
        raise unknown("submission", entry, "see the leaderboards for what there is")
    trials = _trials(session, found)
    lines = session.execute(
        select(Event.time, Event.text).where(Event.submission_id == entry).order_by(Event.id.desc()).limit(500)
    ).all()
    success = success_interval(found.successes or 0, found.judged) if found.judged else None
    both = _compared(session, found)
    ended = all(each.state != "open" for each in both)
    return {
        "id": str(found.id),
        "name": found.name,
        "state": found.state,
        "state_words": _state_words(session, found, trials, present),
        "connected": found.id in present,
        "kind": found.kind,
        "anchor": found.anchor,
        "owner": found.user.name,
        "method": found.method,
        "imitates": found.imitates,
        "created": found.created,
        "finished": found.finished,
        "benchmark": benchmark_view(session, found.split.benchmark),
        "split": found.split.name,
        "n": found.n,
        "wanted": found.wanted,
        "score": interval(found.score, found.score_low, found.score_high),
        "success": interval(success.value, success.low, success.high) if success else None,
        "latency_ms": found.latency_ms,
        "late_share": found.late_share,
        "anchors": anchors(session, found.split_id),
        "trials": trials,
        "log": [{"time": line.time, "text": line.text} for line in reversed(lines)],
        "command": _command(found, base_url),
        "commitment": found.commitment,
        # Given away once it can no longer help anybody to choose: now the promise can be checked.
        "opened": {"order": _order(session, both), "nonce": found.nonce} if ended else None,
        "rival": next(({"submission": str(each.id), "name": each.name} for each in both if each is not found), None),
        "quota": {"used": used_today(session, found.user_id).counted, "limit": found.user.daily_trials},
        "generated": session.scalar(select(now(session))),
    }


def _trials(session: Session, found: Submission) -> list[dict[str, Any]]:
    last = (
        select(Attempt.trial_id, func.max(Attempt.n).label("n"))
        .join(Trial, Trial.id == Attempt.trial_id)
        .where(Trial.submission_id == found.id, Attempt.ended.is_not(None))
        .group_by(Attempt.trial_id)
        .subquery()
    )
    rows = session.execute(
        select(Trial, Result.success, Result.score, Attempt.outcome, Attempt.reason)
        .outerjoin(Result, Result.trial_id == Trial.id)
        .outerjoin(last, last.c.trial_id == Trial.id)
        .outerjoin(Attempt, (Attempt.trial_id == Trial.id) & (Attempt.n == last.c.n))
        .where(Trial.submission_id == found.id)
        .order_by(Trial.slot)
    )
    return [
        {
            "id": trial.id,
            "slot": trial.slot,
            **_case(trial),
            "state": trial.state,
            "outcome": trial_outcome(trial.state, trial.faults, success),
            "score": score,
            "attempts": trial.attempt,
            "fault": _fault(trial, last_outcome, reason),
        }
        for trial, success, score, last_outcome, reason in rows
    ]


def _case(trial: Trial) -> dict[str, Any]:
    """Scene and seed of a trial that was played; before that nobody shall prepare for them, nor by withdrawing it."""
    played = trial.state in ("done", "policy_fault")
    return {"scene": trial.scene if played else None, "seed": trial.seed if played else None}


def _fault(trial: Trial, last_outcome: str | None, reason: str | None) -> str | None:
    """Why a trial stands where it stands, unless it ended well or runs."""
    if trial.state == "needs_human" and last_outcome == "robot_fault":
        return f"{trial.faults} faults of the robot, the last: {reason}"
    told = trial.state in ("policy_fault", "needs_human", "needs_storage") or (
        trial.state == "queued" and last_outcome == "robot_fault"
    )
    return (reason or None) if told else None


def _compared(session: Session, found: Submission) -> list[Submission]:
    """A submission with the one that it is compared to, in the order in which they were sent; or it alone."""
    if found.pairing_id is None:
        return [found]
    query = select(Submission).where(Submission.pairing_id == found.pairing_id).order_by(Submission.id)
    return list(session.scalars(query))


def _order(session: Session, both: list[Submission]) -> list[Any]:
    """What was promised: the order of the slots or, of a comparison, `[slot, side, letter]` of each trial."""
    sides = {each.id: side for side, each in enumerate(both)}
    rows = session.execute(
        select(Trial.slot, Trial.submission_id, Trial.blind_label)
        .where(Trial.submission_id.in_(sides))
        .order_by(Trial.position)
    ).all()
    if len(both) == 1:
        return [row.slot for row in rows]
    return [[row.slot, sides[row.submission_id], row.blind_label[-1]] for row in rows]


def _state_words(session: Session, found: Submission, trials: list[dict[str, Any]], present: Collection[int]) -> str:
    states = Counter(trial["state"] for trial in trials)
    over = sum(states[state] for state in FINAL)
    if found.state == "cancelled":
        return f"Withdrawn after {states['done'] + states['policy_fault']} of {len(trials)} trials"
    if found.state == "done":
        lost = f", {states['policy_fault']} of them lost by the policy" if states["policy_fault"] else ""
        return f"Done: {over} trials{lost}"
    flying = session.execute(
        select(Trial.state, Robot.name)
        .join(Robot, Robot.id == Trial.robot_id)
        .where(Trial.submission_id == found.id, Trial.state.in_(IN_FLIGHT))
    ).one_or_none()
    if flying is not None:
        return f"Running on robot {flying.name}: trial {over + 1} of {len(trials)}"
    so_far = f", {over} of {len(trials)} trials done" if over else ""
    if states["queued"] and found.kind == "remote" and found.id not in present:
        return f"Waits for its policy to connect{so_far}: run the command below"
    if states["queued"]:
        return f"{_queue_words(session, found, present)}{so_far}"
    if states["needs_storage"]:
        return f"Paused, the arena's store is full or away{so_far}"
    wait = "trial waits" if states["needs_human"] == 1 else "trials wait"
    return f"{states['needs_human']} {wait} for the operator of the robot{so_far}"


def _queue_words(session: Session, found: Submission, present: Collection[int]) -> str:
    alive = session.scalar(
        select(func.count(Robot.id)).where(
            Robot.robot_class == found.robot_class, Robot.seen > now(session) - ALIVE_SECONDS
        )
    )
    if not alive:
        return f"Queued: waits for a robot of the class {found.robot_class}, none is here now"
    place = next((row for row in positions(session, present) if row["submission"] == str(found.id)), None)
    if place is None:
        return "Queued"
    about = "" if place["eta_s"] is None else f", starts in about {max(1.0, place['eta_s']):.0f} s"
    return f"Queued: position {place['position']}{about}"


def _command(found: Submission, base_url: str) -> str:
    if found.kind == "remote":
        return f"offbook policy serve RUN --url {base_url} --submission {found.id}"
    where = f"--benchmark {found.split.benchmark.name} --split {found.split.name} --url {base_url}"
    if found.kind == "anchor":
        return f"offbook arena submit {found.anchor} {where}"
    return f"offbook arena submit RUN {where}"


def run(session: Session, entry: int, blobs: BlobStore, base_url: str) -> dict[str, Any]:
    """One trial: what was seen, how fast the answers came, what went wrong, and every attempt at it.

    Args:
        session: any session.
        entry: its id.
        blobs: where its recording is.
        base_url: the arena's address, for the command that puts it back into the queue.

    Raises:
        RefusedError: 404, no such trial.
    """
    trial = session.get(Trial, entry)
    if trial is None:
        raise unknown("trial", entry, "see the submission's page for its trials")
    result = session.scalar(select(Result).where(Result.trial_id == entry))
    attempts = session.execute(
        select(Attempt, Worker.name)
        .join(Worker, Worker.id == Attempt.worker_id)
        .where(Attempt.trial_id == entry)
        .order_by(Attempt.n)
    ).all()
    files = list(result.files) if result else []
    manifest = _manifest(files, blobs)
    ended = [attempt for attempt, _ in attempts if attempt.ended is not None]
    return {
        "id": trial.id,
        "base_url": base_url,
        "submission": {"id": str(trial.submission_id), "name": trial.submission.name},
        "slot": trial.slot,
        **_case(trial),
        "state": trial.state,
        "outcome": trial_outcome(trial.state, trial.faults, result.success if result else None),
        "fault": _fault(trial, ended[-1].outcome, ended[-1].reason) if ended else None,
        "score": result.score if result else None,
        "steps": result.steps if result else None,
        "rate_hz": manifest.get("rate_hz"),
        "videos": videos(files),
        "traces": manifest.get("traces", {}),
        "events": manifest.get("events", []),
        "attempts": [
            {
                "n": attempt.n,
                "worker": worker,
                "started": attempt.leased,
                "ended": attempt.ended,
                "outcome": attempt.outcome,
                "reason": attempt.reason,
            }
            for attempt, worker in attempts
        ],
        "downloads": [{"label": file["name"], "url": f"/v1/blobs/{file['sha256']}"} for file in files],
        "generated": session.scalar(select(now(session))),
    }


def _manifest(files: list[dict[str, Any]], blobs: BlobStore) -> dict[str, Any]:
    """The worker's account of a run, from its blob; a run page without it still shows the rest."""
    file = next((file for file in files if file["name"] == MANIFEST), None)
    try:
        # What the worker said of the size does not count.
        if file is None or blobs.size(file["sha256"]) > _MANIFEST_BYTES:
            return {}
        record = json.loads(b"".join(blobs.read(file["sha256"])))
    except (RefusedError, OSError, ValueError, RecursionError):
        return {}
    return _readable(record) if isinstance(record, dict) else {}


def _readable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a manifest only what the page can draw: numbers that are numbers, one for each step, and events in words."""
    traces, events = record.get("traces"), record.get("events")
    rows = {key: row for key, row in traces.items() if isinstance(row, list)} if isinstance(traces, dict) else {}
    steps = len(rows.get("time", []))
    rows = {key: [_number(value) for value in row] for key, row in rows.items() if len(row) == steps}
    return {
        "rate_hz": _number(record.get("rate_hz")),
        "traces": rows if None not in rows.get("time", [None]) else {},
        "events": [
            {"time": _instant(event.get("time")), **{key: str(event.get(key, ""))[:2000] for key in ("kind", "text")}}
            for event in (events if isinstance(events, list) else [])[:1000]
            if isinstance(event, dict)
        ],
    }


def _instant(value: object) -> float | None:
    """Seconds since 1970 that a calendar holds."""
    number = _number(value)
    return number if number is not None and 0 <= number < 1e11 else None


def _number(value: object) -> float | bool | None:
    return value if isinstance(value, int | float) and abs(value) < 1e12 else None
