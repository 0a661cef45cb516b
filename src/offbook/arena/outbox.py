"""Frames to one peer that may be slow, and how many may come from one that may be mad."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

from offbook.client import wire
from offbook.service.sockets import Line

SEND_SECONDS = 10.0
WAITING_FRAMES = 16
FRAMES_PER_SECOND = 500  # of one policy; each is decoded where all connections are served


class GoneError(Exception):
    """The peer's connection ended; `restart` when this server closed it because it stops."""

    def __init__(self, reason: str, *, restart: bool = False) -> None:
        super().__init__(reason)
        self.restart = restart


class Outbox:
    """Frames to one peer, sent at once unless it is behind with reading.

    Then few wait, in order; of waiting observations (or answers) only the newest.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._frames: deque[tuple[str, bytes]] = deque()
        self._wake, self._greeted = asyncio.Event(), False

    def put(self, kind: str, frame: bytes) -> None:
        """Sends or queues a frame.

        Raises:
            GoneError: the peer has stopped reading.
        """
        if self._greeted and not self._frames and self._line.write_now(frame):
            return
        if kind in ("obs", "act") and self._frames and self._frames[-1][0] == kind:
            self._frames.pop()
        if len(self._frames) >= WAITING_FRAMES:
            raise GoneError("the peer does not read")
        self._frames.append((kind, frame))
        self._wake.set()

    async def run(self) -> None:
        """Sends what waits, until the peer has gone or does not read, which raises GoneError.

        Nothing is sent before: a peer is told first that it was let in.
        """
        self._greeted = True
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._frames:
                try:
                    async with asyncio.timeout(SEND_SECONDS):
                        await self._line.drained()
                except (TimeoutError, ConnectionError) as error:
                    raise GoneError(type(error).__name__) from error
                if self._line.write_now(self._frames[0][1]):
                    self._frames.popleft()


class Rate:
    """Counts the frames of a second."""

    def __init__(self) -> None:
        self._since, self._frames = -math.inf, 0

    def count(self) -> None:
        """Raises WireError (1008) when there are too many."""
        at = time.monotonic()
        if at - self._since >= 1:
            self._since, self._frames = at, 0
        self._frames += 1
        if self._frames > FRAMES_PER_SECOND:
            raise wire.WireError(wire.REFUSED, "frames", expected=f"at most {FRAMES_PER_SECOND} a second", got="more")
