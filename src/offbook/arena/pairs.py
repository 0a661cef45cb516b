"""Which trials may run now: one of a submission at a time, and of a pair one half right after the other.

Two submissions that are compared meet the same scenes and seeds. The lot puts all their trials into one order, in which
the two halves of a pair, the same scene for the one and the other, are neighbours; which of them comes first, and which
is called `policy A`, is drawn for each pair. When the first half has been played the second comes next, on the same
robot as long as that one is there; nothing else of the two runs before it. A half that waits for a person or for
storage keeps the other half waiting, but not the other pairs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, and_, func, literal, or_, select
from sqlalchemy.orm import Session, aliased

from offbook.arena.tables import IN_FLIGHT, Attempt, Robot, Submission, Trial
from offbook.service.database import now

KEPT_SECONDS = 30.0
"""How long after its last sign of life the other half of a pair is kept for the robot that played the first."""

GIVEN_BACK = 3
"""How often robots may fail to begin a half of a pair before any robot may play it, and no longer before all else."""

PLAYED = ("done", "policy_fault")

# Made once: making an alias takes longer than asking a small database. Each stands in one scope of a statement only.
_trial, _running, _rival = aliased(Trial), aliased(Trial), aliased(Submission)
_begun, _begun_mate = aliased(Trial), aliased(Trial)
_own, _both, _flying, _mate = aliased(Trial), aliased(Submission), aliased(Trial), aliased(Trial)
_next_mate, _next_both, _earlier, _other = aliased(Trial), aliased(Submission), aliased(Trial), aliased(Trial)
_robot_mate, _robot = aliased(Trial), aliased(Robot)


def ready(session: Session, robot_class: str, connected: Collection[int], robot_id: int) -> list[ColumnElement[bool]]:
    """Which submissions could be served now: open, with a trial that may run, and the policies there that are remote.

    Args:
        session: whose clock counts.
        robot_class: of the robot that is free.
        connected: remote submissions whose policies are here and idle.
        robot_id: of the robot.

    Returns:
        Conditions, to be tried in their order: first the pairs that this robot has begun, then all.
    """
    alone = and_(
        Submission.pairing_id.is_(None),
        _some(_trial, _trial.submission_id == Submission.id, _trial.state == "queued"),
        ~_some(_running, _running.submission_id == Submission.id, _running.state.in_(IN_FLIGHT)),
    )
    waits = and_(Submission.state == "open", Submission.robot_class == robot_class)
    here = or_(Submission.kind != "remote", Submission.id.in_(sorted(connected)))
    paired = and_(waits, Submission.pairing_id.is_not(None))
    if session.scalar(select(Submission.id).where(paired).limit(1)) is None:
        # The rest is much to ask for nothing.
        return [and_(waits, here, alone)]
    may = _pair_ready(session, connected, robot_id)
    return [and_(paired, here, may, _begun_on(robot_id)), and_(waits, here, or_(alone, and_(paired, may)))]


def _some(rows: Any, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Whether there is a row of an alias, or of several in a tuple, that meets the conditions; all else is outside."""
    own = rows if isinstance(rows, tuple) else (rows,)
    return select(literal(1)).where(*conditions).correlate_except(*own).exists()


def _pair_ready(session: Session, connected: Collection[int], robot_id: int) -> ColumnElement[bool]:
    # A pair is begun only when both policies are here.
    rival_missing = _some(
        _rival,
        _rival.pairing_id == Submission.pairing_id,
        _rival.id != Submission.id,
        _rival.state == "open",
        _rival.kind == "remote",
        _rival.id.not_in(sorted(connected)),
    )
    may = _may_run(session, _trial, robot_id)
    return _some(_trial, _trial.submission_id == Submission.id, may, or_(half(_trial), ~rival_missing))


def _begun_on(robot_id: int) -> ColumnElement[bool]:
    """Whether a submission has a trial whose other half this robot has played."""
    own = (_begun.submission_id == Submission.id, half(_begun), ~_given_back(_begun))
    where = (*own, *_mates(_begun_mate, _begun), _begun_mate.robot_id == robot_id)
    return _some((_begun, _begun_mate), *where)


def next_trial(session: Session, submission: Submission, robot_id: int) -> Trial | None:
    """The trial of a submission that this robot should play now; the caller has locked submission and pairing."""
    query = select(Trial).where(Trial.submission_id == submission.id, Trial.state == "queued").limit(1)
    if submission.pairing_id is None:
        return session.scalar(query.order_by(Trial.position))
    # Asked again, with the locks in hand: on PostgreSQL the rival may have begun a trial since the first look.
    query = query.join(Submission, Submission.id == Trial.submission_id).where(_may_run(session, Trial, robot_id))
    return session.scalar(query.order_by(half(Trial).desc(), Trial.position))


def _may_run(session: Session, trial: Any, robot_id: int) -> ColumnElement[bool]:
    """Whether a trial (or an alias of it) of the paired `Submission` may run now, as far as other trials decide it."""
    of_both = _both.pairing_id == Submission.pairing_id
    flying = _some((_both, _flying), of_both, _flying.submission_id == _both.id, _flying.state.in_(IN_FLIGHT))
    half_waits = _some((_both, _own), of_both, _own.submission_id == _both.id, half(_own))
    second = and_(half(trial), _robot_is_right(session, trial, robot_id))
    return and_(trial.state == "queued", ~flying, or_(second, and_(~half_waits, _is_next(trial))))


def half(trial: Any) -> ColumnElement[bool]:
    """Whether a trial of a pair waits whose other half has been played."""
    return and_(trial.state == "queued", _some(_mate, *_mates(_mate, trial), _mate.state.in_(PLAYED)))


def _mates(mate: Any, trial: Any) -> tuple[ColumnElement[bool], ...]:
    # The two of a pair have a `pair_id` of their own; see `submissions.accept_pair`.
    return mate.pair_id == trial.pair_id, mate.id != trial.id


def _is_next(trial: Any) -> ColumnElement[bool]:
    """Whether a trial is the first half of the first pair that waits as a whole; or its other half was withdrawn."""
    before = _some(
        (_next_both, _earlier, _other),
        _next_both.pairing_id == Submission.pairing_id,
        _earlier.submission_id == _next_both.id,
        _earlier.position < trial.position,
        _earlier.state == "queued",
        *_mates(_other, _earlier),
        _other.state == "queued",
    )
    # Its own other half is no earlier one, or it would be that one's turn.
    waits = and_(_next_mate.state == "queued", ~before)
    return _some(_next_mate, *_mates(_next_mate, trial), or_(waits, _next_mate.state == "cancelled"))


def _robot_is_right(session: Session, trial: Any, robot_id: int) -> ColumnElement[bool]:
    gone = or_(_robot.seen <= now(session) - KEPT_SECONDS, _robot.stopped.is_not(None))
    right = or_(_robot.id == robot_id, gone, _given_back(trial))
    return _some((_robot_mate, _robot), *_mates(_robot_mate, trial), _robot.id == _robot_mate.robot_id, right)


def _given_back(trial: Any) -> ColumnElement[bool]:
    """Whether robots could so often not begin a trial that it no longer waits for the right one, nor goes first."""
    own = select(func.count(Attempt.id)).where(Attempt.trial_id == trial.id, Attempt.outcome == "released")
    return own.correlate_except(Attempt).scalar_subquery() >= GIVEN_BACK
