"""What a robot sees now, for whoever looks at its page: the newest picture alone, where all servers find it.

A worker sends pictures while somebody looks, and the next one takes the place of the last. Looking is noted every few
seconds; the answers to heartbeats tell it to the worker, whichever server it asks.
"""

from __future__ import annotations

import contextlib

from sqlalchemy import case, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from offbook.arena.database import Database
from offbook.arena.tables import Picture, Robot
from offbook.service.database import now
from offbook.service.refusal import unknown

NOTED_SECONDS, LOOKED_SECONDS, FRESH_SECONDS, APART_SECONDS = 5.0, 15.0, 10.0, 0.5


def look(database: Database, robot: str) -> bytes | None:
    """The newest picture as JPEG, None when there is none of the last seconds; notes that somebody looks.

    Raises:
        RefusedError: 404, no such robot.
    """
    with database.read() as session:
        noted = Picture.looked > now(session) - NOTED_SECONDS
        fresh = case((Picture.taken > now(session) - FRESH_SECONDS, Picture.jpeg))
        wanted = select(Robot.id, noted, fresh).outerjoin(Picture, Picture.robot_id == Robot.id)
        found = session.execute(wanted.where(Robot.name == robot)).one_or_none()
    if found is None:
        raise unknown("robot", robot[:80], "see the queue for the robots")
    number, noted_lately, _ = found
    jpeg: bytes | None = found[2]
    if not noted_lately:
        # Of two who look first at the same moment, one makes the row.
        with contextlib.suppress(IntegrityError), database.write() as session:
            row = update(Picture).where(Picture.robot_id == number).values(looked=now(session))
            if session.execute(row.returning(Picture.robot_id)).one_or_none() is None:
                session.add(Picture(robot_id=number, looked=now(session)))
    return jpeg


def watched(session: Session, robot: str) -> bool:
    """Whether somebody looked in the last seconds, so that a picture is worth its cost."""
    lately = Picture.looked > now(session) - LOOKED_SECONDS
    wanted = select(Picture.robot_id).join(Robot, Robot.id == Picture.robot_id).where(Robot.name == robot, lately)
    return session.scalar(wanted) is not None


def show(session: Session, robot: int, jpeg: bytes) -> None:
    """Takes the next picture of a robot, by its number, if somebody looks and the last one is not of just now."""
    due = Picture.taken.is_(None) | (Picture.taken < now(session) - APART_SECONDS)
    lately = Picture.looked > now(session) - LOOKED_SECONDS
    row = update(Picture).where(Picture.robot_id == robot, lately, due)
    session.execute(row.values(jpeg=jpeg, taken=now(session)))
