"""Connections that are cut: of one address too many at once, or with a request's head that does not come to an end."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

HEAD_SECONDS = 10.0
"""How long the head of a request may take, from its connection or its first byte on."""


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


def protocols(limit: int) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """The HTTP and the websocket protocol for uvicorn, with one count of connections for both.

    Args:
        limit: most connections of one address at once.
    """
    door = Door(limit)

    class Http(H11Protocol):
        address: str | None = None
        alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.address = door.enter(transport)
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
            door.leave(self.address)
            self.address = None

        def _disarm(self) -> None:
            if self.alarm is not None:
                self.alarm.cancel()
                self.alarm = None

    class WebSocket(WebSocketsSansIOProtocol):
        address: str | None = None

        def connection_made(self, transport: Any) -> None:
            self.address = door.enter(transport)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            door.leave(self.address)
            self.address = None
            super().connection_lost(exc)

    return Http, cast("type[asyncio.Protocol]", WebSocket)
