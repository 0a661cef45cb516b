"""Connections that are cut: of one address too many at once, or of a peer that lets the server wait.

A head or a frame must come to an end, a body must keep moving, and what is sent must be read.

A relay may read and write frames here at once (`line_of`), without the queues and tasks of the layers above.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, Protocol, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

HEAD_SECONDS = 10.0
"""How long the head of a request may take, from its connection or its first byte on."""

FRAME_SECONDS = 10.0
"""How long a websocket message may take from its first bytes to its last."""

BODY_SECONDS = 30.0
"""Within how long a request's body must bring `BODY_BYTES` more, or end; not counted while the server does not read."""

BODY_BYTES = 64 * 1024
"""Least that a body brings in that time: 2 kB/s, so that a slow line may take as long as it needs for a large file."""

WRITE_SECONDS = 60.0
"""How long a peer may take nothing of what waits for it before the connection ends, even one that is being closed.

The kernel counts this: it knows what arrived. A player that pauses a film for some minutes loses its connection so, and
asks for the rest with a Range.
"""

PINGS = 64
"""How often a peer may ping while what it was sent before waits to be read: each answer is kept for it, in memory."""

FRAGMENTS = 64
"""Into how many pieces a websocket message may be cut: empty ones would cost memory without end."""


_LINE = "offbook.line"  # an extension of a websocket's scope


class Line(Protocol):
    """A websocket's connection, as this server holds it."""

    def write_now(self, frame: bytes) -> bool:
        """Sends a binary message, unless the peer is behind with reading or has gone; whether it was sent."""

    async def drained(self) -> None:
        """Waits until the peer has read enough to be sent more; one that has gone raises ConnectionError."""

    async def deliver(self, take: Callable[[bytes], None], receive: Callable[[], Awaitable[bytes]]) -> None:
        """Gives each binary message to `take` as it comes, until it or `receive`, which waits for the end, raises."""


def line_of(scope: Mapping[str, Any]) -> Line:
    """The connection of a websocket's scope, which is there under `service.serving.Server` alone."""
    return cast("Line", scope["extensions"][_LINE])


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


class _Charged:
    """A connection that is charged to its address, and cut when its peer does not read what it is sent."""

    door: ClassVar[Door]
    address: str | None = None
    alarm: asyncio.TimerHandle | None = None  # for a head or a frame that has begun

    def _enter(self, transport: asyncio.BaseTransport) -> None:
        self.address = self.door.enter(transport)
        connection = transport.get_extra_info("socket")
        # Else a frame behind a ping waits until that is acknowledged. asyncio leaves it off where the listener did not
        # name its protocol.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # only Linux counts this
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * WRITE_SECONDS))

    def _give_up(self) -> None:
        self._disarm()
        self.door.leave(self.address)
        self.address = None

    def _disarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None


class _Http(_Charged, H11Protocol):
    body: asyncio.TimerHandle | None = None  # for a body that has begun
    brought = 0  # bytes of it since that timer was set
    excused = False  # whether the server itself did not read for a while since then

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(transport)
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
        self._follow_body(len(data))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow_body(0)  # of the next request, which may have come together with the one that is answered

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        # The connection goes over to the websocket's protocol, which counts it anew.
        self._give_up()
        super().handle_websocket_upgrade(event)
        if self.flow.write_paused:  # by an answer before; the transport tells this only once
            cast("asyncio.Protocol", self.transport.get_protocol()).pause_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up()
        super().connection_lost(exc)

    def _follow_body(self, size: int) -> None:
        if self.address is None or self.conn.their_state is not h11.SEND_BODY:
            self._forget_body()
        elif self.body is None:
            self._expect_body()
        else:
            self.brought += size
            self.excused = self.excused or self.flow.read_paused

    def _expect_body(self) -> None:
        # A client that asked whether to go on waits for the server, as one does whose bytes are not read.
        self.brought, self.excused = 0, self.flow.read_paused or self.conn.they_are_waiting_for_100_continue
        self.body = self.loop.call_later(BODY_SECONDS, self._judge_body)

    def _judge_body(self) -> None:
        if self.excused or self.brought >= BODY_BYTES:
            self._expect_body()
        else:
            self.transport.abort()

    def _forget_body(self) -> None:
        if self.body is not None:
            self.body.cancel()
            self.body = None

    def _give_up(self) -> None:
        self._forget_body()
        super()._give_up()


_NO_HANDSHAKE = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class _WebSocket(_Charged, WebSocketsSansIOProtocol):
    pings = 0  # that came while the peer did not read
    taker: Callable[[bytes], None] | None = None  # of messages, in place of the queue

    def connection_made(self, transport: Any) -> None:
        self._enter(transport)
        super().connection_made(transport)

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:
            cast("dict[str, Any]", self.scope)["extensions"][_LINE] = self

    def write_now(self, frame: bytes) -> bool:
        if self.close_sent or not self.writable.is_set() or self.transport.is_closing():
            return False
        self.conn.send_binary(frame)
        self.transport.write(b"".join(self.conn.data_to_send()))
        return True

    async def drained(self) -> None:
        await self.writable.wait()
        if self.close_sent or self.transport.is_closing():
            raise ConnectionResetError("the peer has gone")

    async def deliver(self, take: Callable[[bytes], None], receive: Callable[[], Awaitable[bytes]]) -> None:
        broken: asyncio.Future[bytes] = self.loop.create_future()

        def carefully(frame: bytes) -> None:
            try:
                take(frame)
            except Exception as error:  # the reader of bytes, which calls this, would not know what to do with it
                self.taker = None
                broken.set_exception(error)

        while not self.queue.empty():
            take(await receive())
        self.taker = carefully
        ending = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((ending, broken), return_when=asyncio.FIRST_COMPLETED)
            (broken if broken.done() else ending).result()
        finally:
            self.taker = None
            ending.cancel()
            broken.cancel()
            await asyncio.gather(ending, broken, return_exceptions=True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            # A head that is no handshake, of which the class above takes no notice: its answer may lie ready.
            self.handshake_initiated = self.handshake_complete = self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()) or _NO_HANDSHAKE)
            self.transport.close()
        if not (self.conn.reader.buffer or self.frames):
            self._disarm()
        elif self.alarm is None:
            self.alarm = self.loop.call_later(FRAME_SECONDS, self._cut)

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) > FRAGMENTS:
            self.frames = []
            self.transport.abort()

    def handle_ping(self) -> None:
        # An honest peer on a slow line pings too, now and then, while a large frame is on its way to it.
        self.pings += not self.writable.is_set()
        if self.pings > PINGS:
            self.transport.abort()
        else:
            super().handle_ping()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.pings = 0

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        if self.transport.get_write_buffer_size():  # closing alone would wait for the peer to read
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        # A message is whole; of the next one there may be some bytes already, whose time begins now.
        self._disarm()
        if self.taker is None or self.curr_msg_data_type == "text" or self.close_sent:
            self.taker = None  # what stands behind a text, which nobody takes, is in the queue behind it
            super().send_receive_event_to_app()
        else:
            frame, self.frames = b"".join(self.frames), []
            self.taker(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up()
        super().connection_lost(exc)

    def _cut(self) -> None:
        self.alarm = None
        if self.read_paused:  # the arena has not come to read the rest
            self.alarm = self.loop.call_later(FRAME_SECONDS, self._cut)
        else:
            self.transport.abort()


def protocols(limit: int) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """The HTTP and the websocket protocol for uvicorn, with one count of connections for both.

    Args:
        limit: most connections of one address at once.
    """
    shared = {"door": Door(limit)}
    return type("Http", (_Http,), shared), cast("type[asyncio.Protocol]", type("WebSocket", (_WebSocket,), shared))
