"""What may happen to a trial, and nothing else.

    queued -> leased -> running -> done
       ^         |          |--> policy_fault   (the client left, NaN, refused: the worst score, never retried)
       |---------+----------+--> robot_fault    (worker lost, e-stop, camera: the same scene and seed again; at the
                                                 third such fault the trial waits for a person)
    cancelled from queued or leased; an expired lease is a robot fault.

The promise: no accepted submission is lost; each trial has at most one committed result; a trial may be physically
attempted again only after an attempt recorded as robot_fault, with the same scene and seed, and all attempts stay
visible. (Nobody can promise that an arm moves exactly once.) An attempt that never moved the arm is recorded as
`released`, and one that found the disk full as `needs_storage`.

Every transition is one conditional UPDATE by id, fence and state. A lease raises the fence, so that whatever a worker
sends for an earlier lease finds no row and gets 409 with the current fence. Time is the database's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from offbook.arena.standing import refresh_summary
from offbook.arena.tables import FINAL, IN_FLIGHT, Attempt, Benchmark, Event, Result, Robot, Split, Submission, Trial
from offbook.service.database import now
from offbook.service.refusal import RefusedError, unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """The times and counts of the protocol.

    Attributes:
        lease_seconds: how long a lease lives without a heartbeat; longer than the watchdog.
        watchdog_seconds: after this long without an answer to its heartbeats a worker stops its robot.
        fault_cap: robot faults of one trial after which a person must look.
    """

    lease_seconds: float = 15.0
    watchdog_seconds: float = 2.0
    fault_cap: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a worker says of an attempt that ended.

    Attributes:
        outcome: `"done"`, `"policy_fault"`, `"robot_fault"`, `"needs_human"`, `"needs_storage"` or `"released"`.
        reason: why, in words; empty for a plain end.
        score: of a trial that is done.
        success: whether the task was achieved, None where it has no such notion.
        steps: control steps that were executed.
        latency_ms: median time from observation to action.
        late_share: share of control ticks without an action in time, 0 to 1.
        files: what was uploaded: `{name, sha256, media_type, size}` each.
    """

    outcome: str
    reason: str = ""
    score: float | None = None
    success: bool | None = None
    steps: int = 0
    latency_ms: float | None = None
    late_share: float | None = None
    files: tuple[Mapping[str, Any], ...] = ()

    def digest(self) -> str:
        """A hash by which a repeated report is recognised."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "files"}
        content = json.dumps([record, [dict(file) for file in self.files]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def start(session: Session, trial_id: int, fence: int) -> dict[str, Any]:
    """The robot is about to move. A repetition for the same fence is granted; anything stale gets 409."""
    if move(session, trial_id, fence, ("leased",), {"state": "running", "progress": 0.0}):
        _touch(session, trial_id, fence, started=now(session))
        trial = _current(session, trial_id)
        note_trial(session, "started", f"trial {trial.slot} runs, attempt {trial.attempt}", trial, trial.robot_id)
    elif not move(session, trial_id, fence, ("running",), {"state": "running"}):
        raise _stale(session, trial_id, fence)
    return {"trial": trial_id, "fence": fence, "state": "running"}


def heartbeat(
    session: Session, trial_id: int, fence: int, *, progress: float | None = None, rules: Rules | None = None
) -> dict[str, Any]:
    """Keeps a lease alive; a lease that has run out cannot be revived.

    Args:
        session: a writing session.
        trial_id: the trial.
        fence: of the worker's lease.
        progress: share of the trial that is done, 0 to 1, for the pages.
        rules: the protocol's times.
    """
    rules = rules or Rules()
    values = {"lease_until": now(session) + rules.lease_seconds, "progress": progress}
    if not move(session, trial_id, fence, IN_FLIGHT, values):
        raise _stale(session, trial_id, fence)
    session.execute(
        update(Robot)
        .where(Robot.id == select(Trial.robot_id).where(Trial.id == trial_id).scalar_subquery())
        .values(seen=now(session)),
        execution_options={"synchronize_session": False},
    )
    return {"trial": trial_id, "fence": fence, "lease_seconds": rules.lease_seconds}


def end(session: Session, trial_id: int, fence: int, report: Report, *, rules: Rules | None = None) -> dict[str, Any]:
    """Takes the report on an attempt; the same report for the same fence again gets the same answer.

    Raises:
        RefusedError: 409 with the current fence and state when the lease is no longer this worker's; 404, no trial.
    """
    answer = settle(session, trial_id, fence, report, rules or Rules())
    if answer is not None:
        return answer
    attempt = session.scalar(select(Attempt).where(Attempt.trial_id == trial_id, Attempt.fence == fence))
    if attempt is not None and attempt.answer is not None and attempt.report == report.digest():
        return attempt.answer
    raise _stale(session, trial_id, fence)


def reap(session: Session, rules: Rules | None = None) -> int:
    """Records a robot fault for every lease that has run out; returns how many there were."""
    expired = session.execute(
        select(Trial.id, Trial.fence)
        .where(Trial.state.in_(IN_FLIGHT), Trial.lease_until <= now(session))
        .order_by(Trial.submission_id)
    ).all()
    report = Report(outcome="robot_fault", reason="worker lost: no heartbeat until the lease ran out")
    return sum(
        settle(session, trial_id, fence, report, rules or Rules(), alive=False) is not None
        for trial_id, fence in expired
    )


_NEXT = {
    "done": "done",
    "policy_fault": "policy_fault",
    "needs_human": "needs_human",
    "needs_storage": "needs_storage",
    "released": "queued",
}
_FROM = {"done": ("running",), "released": ("leased",)}


def settle(
    session: Session, trial_id: int, fence: int, report: Report, rules: Rules, *, alive: bool = True
) -> dict[str, Any] | None:
    """Ends an attempt; None when the lease is not (or no longer) the one that the report is about."""
    # The submission first, as everywhere: two transactions that lock in one order cannot wait for each other. Row locks
    # here let foreign keys be checked (key_share), or a new event would wait for a lease that waits for its trial.
    submission = session.scalar(
        select(Submission)
        .where(Submission.id == select(Trial.submission_id).where(Trial.id == trial_id).scalar_subquery())
        .with_for_update(key_share=True)
    )
    faults = session.scalar(select(Trial.faults).where(Trial.id == trial_id)) or 0
    values: dict[str, Any] = {"lease_until": None, "progress": None}
    if report.outcome == "robot_fault":
        values |= {"state": "queued" if faults + 1 < rules.fault_cap else "needs_human", "faults": faults + 1}
    else:
        values |= {"state": _NEXT[report.outcome]}
    if submission is not None and submission.state == "cancelled" and values["state"] not in FINAL:
        values["state"] = "cancelled"
    allowed = _FROM.get(report.outcome, IN_FLIGHT)
    if submission is None or not move(session, trial_id, fence, allowed, values, alive=alive, expired=not alive):
        return None
    trial = _current(session, trial_id)
    answer = {"trial": trial_id, "fence": fence, "state": trial.state, "attempt": trial.attempt}
    _touch(
        session,
        trial_id,
        fence,
        ended=now(session),
        outcome=report.outcome,
        reason=report.reason[:2000],
        report=report.digest(),
        answer=answer,
    )
    if report.outcome in ("done", "policy_fault"):
        _add_result(session, trial, submission, report)
    note_trial(session, report.outcome, _words(trial, report), trial, trial.robot_id)
    close_if_finished(session, submission)
    return answer


def _add_result(session: Session, trial: Trial, submission: Submission, report: Report) -> None:
    query = select(Benchmark).join(Split, Split.benchmark_id == Benchmark.id).where(Split.id == submission.split_id)
    benchmark, lost = session.scalars(query).one(), report.outcome == "policy_fault"
    score = benchmark.fault_score if lost or report.score is None else report.score
    least, most = (-math.inf if benchmark.least is None else benchmark.least,
                   math.inf if benchmark.most is None else benchmark.most)  # fmt: skip
    if not least <= score <= most:
        raise RefusedError(422, "bad_score", f"score of trial {trial.id}", expected=f"{least:g} to {most:g}",
                           got=f"{score:g}", fix="correct the robot's driver")  # fmt: skip
    session.add(
        Result(
            trial_id=trial.id,
            submission_id=submission.id,
            attempt=trial.attempt,
            outcome=report.outcome,
            reason=report.reason[:2000],
            score=score,
            success=False if lost else report.success,
            steps=report.steps,
            latency_ms=report.latency_ms,
            late_share=report.late_share,
            files=[dict(file) for file in report.files],
            created=now(session),
        )
    )
    session.flush()
    refresh_summary(session, submission, benchmark)


def _words(trial: Trial, report: Report) -> str:
    because = f": {report.reason}" if report.reason else ""
    if report.outcome == "done":
        return f"trial {trial.slot} done, score {report.score:.3g}{because}"
    then = {"queued": ", will be run again", "needs_human": ", waits for a person"}.get(trial.state, "")
    return f"trial {trial.slot} {report.outcome.replace('_', ' ')}{then}{because}"


def close_if_finished(session: Session, submission: Submission) -> None:
    """Marks a submission as done when no trial of it is left to run; the caller holds its lock."""
    waiting = ("queued", "leased", "running", "needs_human", "needs_storage")
    left = session.scalar(
        select(Trial.id).where(Trial.submission_id == submission.id, Trial.state.in_(waiting)).limit(1)
    )
    if left is None and submission.state == "open":
        submission.state = "done"
        submission.finished = now(session)
        session.flush()
        note(session, "finished", "all trials are done", submission_id=submission.id)


def requeue(session: Session, trial_id: int) -> dict[str, Any]:
    """Puts a trial that waited for a person or for storage back into the queue, same scene and seed.

    Raises:
        RefusedError: 409, the trial does not wait for anybody; 404, no such trial.
    """
    trial = session.get(Trial, trial_id)
    if trial is None:
        raise unknown("trial", trial_id, "see the submission's page for its trials")
    values = {"state": "queued", "faults": 0}
    if not move(session, trial_id, trial.fence, ("needs_human", "needs_storage"), values, alive=False):
        raise _stale(session, trial_id, trial.fence)
    note_trial(session, "requeued", f"trial {trial.slot} was put back into the queue by the operator", trial, None)
    return {"trial": trial_id, "fence": trial.fence, "state": "queued"}


def move(
    session: Session,
    trial_id: int,
    fence: int,
    states: tuple[str, ...],
    values: Mapping[str, Any],
    *,
    alive: bool = True,
    expired: bool = False,
) -> bool:
    """The one conditional UPDATE behind every transition; false when the row was not as expected."""
    conditions: list[ColumnElement[bool]] = [Trial.id == trial_id, Trial.fence == fence, Trial.state.in_(states)]
    if alive:
        conditions.append(Trial.lease_until > now(session))
    if expired:
        # Asked again here: a heartbeat may have come between the look and this statement.
        conditions.append(Trial.lease_until <= now(session))
    moved = session.execute(
        update(Trial).where(*conditions).values(**values).returning(Trial.id),
        execution_options={"synchronize_session": False},
    )
    return moved.one_or_none() is not None


def _current(session: Session, trial_id: int) -> Trial:
    return session.get_one(Trial, trial_id, populate_existing=True)


def _touch(session: Session, trial_id: int, fence: int, **values: Any) -> None:
    session.execute(
        update(Attempt).where(Attempt.trial_id == trial_id, Attempt.fence == fence).values(**values),
        execution_options={"synchronize_session": False},
    )


def _stale(session: Session, trial_id: int, fence: int) -> RefusedError:
    trial = session.get(Trial, trial_id, populate_existing=True)
    if trial is None:
        return unknown("trial", trial_id, "use the number in the lease")
    return RefusedError(
        409,
        "stale_fence",
        f"trial {trial_id}",
        expected="the live lease that this step needs",
        got=f"fence {fence}, while the trial is {trial.state} at fence {trial.fence}",
        fix="stop the robot, drop this attempt and ask for a new lease",
        fence=trial.fence,
        state=trial.state,
    )


def note_trial(session: Session, kind: str, text: str, trial: Trial, robot_id: int | None) -> None:
    """Adds a line about a trial to the log."""
    note(session, kind, text, submission_id=trial.submission_id, trial_id=trial.id, robot_id=robot_id)


def note(
    session: Session,
    kind: str,
    text: str,
    *,
    submission_id: int | None = None,
    trial_id: int | None = None,
    robot_id: int | None = None,
) -> None:
    """Adds a line to the log, in the same transaction as what it tells."""
    session.add(
        Event(
            time=now(session),
            kind=kind,
            text=text[:2000],
            submission_id=submission_id,
            trial_id=trial_id,
            robot_id=robot_id,
        )
    )
