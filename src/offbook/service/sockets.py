"""Connections that are cut: of one address too many at once, or with a head or a frame that does not come to an end."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

HEAD_SECONDS = 10.0
"""How long the head of a request may take, from its connection or its first byte on."""

FRAME_SECONDS = 10.0
"""How long a websocket message may take from its first bytes to its last."""

FRAGMENTS = 64
"""Into how many pieces a websocket message may be cut: empty ones would cost memory without end."""


class Door:
    """Counts the open connections of each address.

    Args:
        limit: most of one address at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: Counter[str] = Counter()

    def enter(self, transport: asyncio.BaseTransport) -> str | None:
        """The address, counted; None when it has too many connections already."""
        address = str((transport.get_extra_info("peername") or ("",))[0])
        if self._open[address] >= self._limit:
            return None
        self._open[address] += 1
        return address

    def leave(self, address: str | None) -> None:
        """Forgets a connection that was counted."""
        if address is not None:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]


class _Http(H11Protocol):
    door: ClassVar[Door]
    address: str | None = None
    alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.door.enter(transport)
        if self.address is None:
            transport.abort()
        else:
            self.alarm = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        unfinished = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not unfinished:
            self._disarm()
        elif self.alarm is None:
            self.alarm = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        # The connection goes over to the websocket's protocol, which counts it anew.
        self._give_up()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        self._disarm()
        self.door.leave(self.address)
        self.address = None

    def _disarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None


class _WebSocket(WebSocketsSansIOProtocol):
    door: ClassVar[Door]
    address: str | None = None
    alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.address = self.door.enter(transport)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not (self.conn.reader.buffer or self.frames):
            self._disarm()
        elif self.alarm is None:
            self.alarm = self.loop.call_later(FRAME_SECONDS, self._cut)

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) > FRAGMENTS:
            self.frames = []
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        # A message is whole; of the next one there may be some bytes already, whose time begins now.
        self._disarm()
        super().send_receive_event_to_app()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.door.leave(self.address)
        self.address = None
        super().connection_lost(exc)

    def _cut(self) -> None:
        self.alarm = None
        if self.read_paused:  # the arena has not come to read the rest
            self.alarm = self.loop.call_later(FRAME_SECONDS, self._cut)
        else:
            self.transport.abort()

    def _disarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None


def protocols(limit: int) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """The HTTP and the websocket protocol for uvicorn, with one count of connections for both.

    Args:
        limit: most connections of one address at once.
    """
    shared = {"door": Door(limit)}
    return type("Http", (_Http,), shared), cast("type[asyncio.Protocol]", type("WebSocket", (_WebSocket,), shared))
