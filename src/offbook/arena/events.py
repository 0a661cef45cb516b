"""News for live pages: one look at the log for all who listen, sent as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool

from offbook.arena.database import Database
from offbook.arena.tables import Event
from offbook.service.refusal import RefusedError

KEEP_ALIVE_SECONDS = 15.0


class Feed:
    """Hands new lines of the log to every listener.

    Args:
        database: where the log is.
        limit: most listeners at once.
        per_address: most of them at one address.
    """

    def __init__(self, database: Database, *, limit: int, per_address: int) -> None:
        self._database, self._limit, self._per_address = database, limit, per_address
        self._listeners: dict[asyncio.Queue[str | None], str] = {}
        self._last: int | None = None

    async def poll(self) -> None:
        """Looks for news, when anybody listens."""
        if not self._listeners:
            self._last = None
            return
        news = await run_in_threadpool(self._read)
        for line in news:
            for queue in list(self._listeners):
                if queue.full():
                    # It only needs to know that something happened: the oldest line may go.
                    queue.get_nowait()
                queue.put_nowait(line)

    def _read(self) -> list[str]:
        with self._database.read() as session:
            if self._last is None:
                self._last = session.scalar(select(func.max(Event.id))) or 0
                return []
            rows = session.scalars(select(Event).where(Event.id > self._last).order_by(Event.id).limit(200)).all()
            if rows:
                self._last = rows[-1].id
            return [f"id: {row.id}\ndata: {json.dumps(_record(row))}\n\n" for row in rows]

    def listen(self, address: str) -> AsyncIterator[str]:
        """The stream of one listener.

        Args:
            address: where it is.

        Raises:
            RefusedError: 503, too many listen already, or too many there.
        """
        if self._full(address):
            most = f"at most {self._limit} listeners, and {self._per_address} at one address"
            raise RefusedError(503, "too_many_listeners", "live events", expected=most, got="one more",
                               fix="reload now and then instead")  # fmt: skip
        return self._stream(address)

    def _full(self, address: str) -> bool:
        there = sum(each == address for each in self._listeners.values())
        return len(self._listeners) >= self._limit or there >= self._per_address

    async def _stream(self, address: str) -> AsyncIterator[str]:
        # A place is taken only here: a stream whose reader left before it began would never give it back.
        queue: asyncio.Queue[str | None] = asyncio.Queue(maxsize=50)
        if self._full(address):
            return
        self._listeners[queue] = address
        try:
            yield "retry: 3000\n\n"
            while True:
                try:
                    line = await asyncio.wait_for(queue.get(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    line = ": still here\n\n"
                if line is None:
                    return
                yield line
        finally:
            self._listeners.pop(queue, None)

    def close(self) -> None:
        """Ends all streams, so that the process can end."""
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)


def _record(row: Event) -> dict[str, Any]:
    return {
        "time": row.time,
        "kind": row.kind,
        "text": row.text,
        "submission": None if row.submission_id is None else str(row.submission_id),
        "trial": row.trial_id,
    }
