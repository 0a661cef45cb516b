"""Who is next: start-time fair queueing among users, with a weight that shrinks with recent use.

Each attempt carries two tags in virtual robot seconds. A user's next attempt starts at S = max(V, F), where V is the
start tag of the attempt that was leased last and F the finish tag of this user's last attempt; it finishes at
F = S + cost / weight, with weight = 1 / (1 + hours of robot time used in the last 7 days). The smallest S is
served. A newcomer starts at V: neither behind those who queue for days, nor with credit for time not asked for.

Which trials may run at all is told in `pairs`.

Source: Goyal, Vin and Cheng, "Start-time fair queueing" (1997), section 2; for several robots at once Jin, Chase and
Kaur, "Interposed proportional sharing for a storage service utility" (2004), which takes V as we do.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.orm import Session

from offbook.arena.tables import Attempt, Submission, User
from offbook.service.database import now

WEEK = 7 * 86400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A user who waits.

    Attributes:
        user_id: who.
        start_tag: S, at which their next attempt would start.
        submission_id: their oldest that may run.
        leased_at: V after the attempt, where that is not S: what is leased out of turn leaves V as it was.
    """

    user_id: int
    start_tag: float
    submission_id: int
    leased_at: float | None = None


def turns(session: Session, robot_class: str, condition: ColumnElement[bool]) -> list[Turn]:
    """Users with a submission that meets the condition, those who are next first."""
    last = _finish_tag(robot_class)
    query = (
        select(User.id, last, func.min(Submission.id))
        .join(Submission, Submission.user_id == User.id)
        .where(condition)
        .group_by(User.id)
    )
    virtual = virtual_time(session, robot_class)
    found = [
        Turn(user_id=user, start_tag=max(virtual, finish or 0.0), submission_id=oldest)
        for user, finish, oldest in session.execute(query)
    ]
    return sorted(found, key=lambda turn: (turn.start_tag, turn.submission_id))


def _finish_tag(robot_class: str) -> ColumnElement[float | None]:
    return (
        select(func.max(Attempt.finish_tag))
        .where(Attempt.user_id == User.id, Attempt.robot_class == robot_class)
        .correlate(User)
        .scalar_subquery()
    )


def virtual_time(session: Session, robot_class: str) -> float:
    """V: the start tag of the attempt that was leased last on this class of robots."""
    return session.scalar(select(func.max(Attempt.start_tag)).where(Attempt.robot_class == robot_class)) or 0.0


def robot_seconds(session: Session, user_id: int | None = None) -> dict[int, float]:
    """Robot time that users' attempts took in the last 7 days, on all robots, with what runs now.

    Args:
        session: any session.
        user_id: of one user; of all who used any when None.

    Returns:
        Seconds by user; who is not in it has used none.
    """
    present = now(session)
    spent = case((Attempt.ended.is_(None), present), else_=Attempt.ended) - Attempt.leased
    query = select(Attempt.user_id, func.sum(spent)).where(Attempt.leased > present - WEEK).group_by(Attempt.user_id)
    rows = session.execute(query if user_id is None else query.where(Attempt.user_id == user_id))
    return {user: max(0.0, float(seconds or 0.0)) for user, seconds in rows}


def finish_tag(turn: Turn, cost: float, used: float) -> float:
    """F for an attempt of `cost` expected seconds by a user who has used `used` seconds.

    Example:
        >>> turn = Turn(user_id=1, start_tag=10.0, submission_id=1)
        >>> finish_tag(turn, cost=30.0, used=3600.0)
        70.0
    """
    return turn.start_tag + cost * (1.0 + used / 3600.0)
