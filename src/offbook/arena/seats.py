"""Which policy is connected to which of the servers that share a database: workers are sent to the right one."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from offbook.arena.database import Database
from offbook.arena.tables import Seat
from offbook.service.database import now

RENEW_SECONDS, VALID_SECONDS = 5.0, 20.0


class SeatBook:
    """The seats of one server among those of all.

    Args:
        database: that they share.
        url: where workers reach this server itself; empty when they do not, so that only its own serve its policies.
    """

    def __init__(self, database: Database, url: str = "") -> None:
        self._database, self._url = database, url
        self._server = secrets.token_hex(8)

    def take(self, submission: int) -> None:
        """Notes that a policy sits here now, wherever it sat before."""
        for _ in range(2):
            # A second policy of the submission may dial in elsewhere at the same moment; one of the two comes last.
            with contextlib.suppress(IntegrityError), self._database.write() as session:
                values = {"server": self._server, "url": self._url, "seen": now(session)}
                seat = update(Seat).where(Seat.submission_id == submission).values(**values)
                found = session.execute(seat.returning(Seat.submission_id)).one_or_none()
                if found is None:
                    session.add(Seat(submission_id=submission, **values))
                    session.flush()
                return

    def leave(self, submission: int) -> None:
        """Notes that a policy has left this server."""
        with contextlib.suppress(SQLAlchemyError), self._database.write() as session:
            # A row that cannot be removed now is too old soon.
            session.execute(delete(Seat).where(Seat.submission_id == submission, Seat.server == self._server))

    def moved(self, session: Session, mine: Collection[int]) -> set[int]:
        """Those of the policies that sat here of which another server has said since that they sit there."""
        there = select(Seat.submission_id).where(Seat.submission_id.in_(mine), Seat.server != self._server)
        return set(session.scalars(there))

    def renew(self, mine: Collection[int]) -> tuple[set[int], dict[int, str]]:
        """Says that these policies still sit here.

        Returns:
            Those of them that sit elsewhere by now, and where the policies of the other servers are reached.
        """
        if mine:
            with self._database.write() as session:
                own = update(Seat).where(Seat.submission_id.in_(mine), Seat.server == self._server)
                session.execute(own.values(seen=now(session)))
        with self._database.read() as session:
            valid = Seat.seen > now(session) - VALID_SECONDS
            rows = session.execute(select(Seat.submission_id, Seat.url).where(Seat.server != self._server, valid)).all()
        elsewhere = {row.submission_id: row.url for row in rows}
        return elsewhere.keys() & set(mine), elsewhere
