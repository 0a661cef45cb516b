"""Connections that only cost: too many of one address, heads that never end, bodies that stand still, deaf peers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from arena_server import META, running, until
from websockets.sync.client import connect

from offbook.client import wire
from offbook.service import sockets
from offbook.service.serving import Server

pytestmark = [pytest.mark.service, pytest.mark.faults]


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Little patience with heads, for tests whose peers are slow on purpose."""
    monkeypatch.setattr(sockets, "HEAD_SECONDS", 0.3)


@pytest.fixture
def arena(tmp_path):
    with running(tmp_path, connections_per_address=4) as arena:
        yield arena


def line(arena) -> socket.socket:
    parts = urlsplit(arena.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def deaf_line(arena) -> socket.socket:
    """A line whose kernel takes only a few bytes until they are read."""
    parts, connection = urlsplit(arena.url), socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect((parts.hostname, parts.port))
    return connection


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def healthy(arena) -> bool:
    try:
        return httpx.get(f"{arena.url}/healthz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: "], ids=["nothing", "half a head"])
def test_a_head_that_does_not_end_is_cut_off(arena, hasty, head: bytes) -> None:
    with line(arena) as connection:
        connection.sendall(head)
        assert ended(connection)


def test_a_second_request_of_a_connection_has_no_more_time_than_the_first(arena, monkeypatch) -> None:
    with line(arena) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while b'{"ok":true}' not in answer:
            answer += connection.recv(4096)
        monkeypatch.setattr(sockets, "HEAD_SECONDS", 0.3)
        connection.sendall(b"GET /healthz HT")
        assert ended(connection)


def test_one_address_has_so_many_connections_and_gets_them_back(arena) -> None:
    for _ in range(3):
        with line(arena) as a, line(arena) as b, line(arena) as c, line(arena) as d, line(arena) as e:
            assert ended(e)
            for connection in (a, b, c, d):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert until(lambda: healthy(arena))


def test_a_websocket_counts_as_one_connection_until_it_ends(arena) -> None:
    headers = {"Authorization": f"Bearer {arena.tokens['ada']}"}
    address = arena.url.replace("http", "ws") + "/v1/play"
    for _ in range(6):
        with connect(address, additional_headers=headers, proxy=None), line(arena) as a, line(arena) as b:
            for connection in (a, b):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            with line(arena) as last, line(arena) as refused:
                assert ended(refused)
                assert last.fileno() > 0
        assert until(lambda: healthy(arena))


def test_what_is_sent_does_not_wait_for_what_was_sent_before_to_be_acknowledged(arena) -> None:
    def held_back() -> set[int]:
        held = arena.server.server_state.connections
        lines = [connection.transport.get_extra_info("socket") for connection in held]
        return {line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for line in lines}

    with line(arena):
        until(lambda: held_back() == {1})
    with upgraded(arena):
        assert held_back() == {1}


def upgrade(path: str, token: str = "") -> bytes:
    """The head of a request that becomes a websocket."""
    head = (
        f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    return head.encode()


def test_a_stranger_is_refused_before_a_large_body_is_read(arena) -> None:
    forged = f"Authorization: Bearer ob_00000000_{'a' * 43}\r\n"
    for length in ("Content-Length: 1000000", "Transfer-Encoding: chunked"):
        for path, token in (("/v1/leases", ""), ("/v1/leases", forged), ("/api/rating/v1/studies", "")):
            with line(arena) as connection:
                connection.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\n{token}{length}\r\n\r\n".encode())
                assert connection.recv(4096).startswith(b"HTTP/1.1 401")


@contextmanager
def upgraded(arena, dial=line):
    """A policy that is seated, as a bare socket: its frames can be ill-formed."""
    entry = arena.submit("ada")
    with dial(arena) as connection:
        connection.sendall(upgrade("/v1/play", arena.tokens["ada"]))
        assert connection.recv(4096).startswith(b"HTTP/1.1 101")
        connection.sendall(frame(wire.encode(wire.hello(META, entry, "raw")), opcode=2, fin=True))
        until(lambda: int(entry) in arena.gateway.present())
        yield connection


def frame(payload: bytes, *, opcode: int, fin: bool, announced: int | None = None) -> bytes:
    """A masked frame of a client, with an eight-byte length."""
    size = len(payload) if announced is None else announced
    return bytes([opcode | (0x80 if fin else 0), 0xFF]) + size.to_bytes(8, "big") + b"\0\0\0\0" + payload


def cut(connection: socket.socket, seconds: float = 15.0) -> bool:
    """Whether the arena ends the line within that time."""
    end = time.monotonic() + seconds
    connection.settimeout(seconds)
    try:
        while time.monotonic() < end:
            if not connection.recv(4096):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


@pytest.mark.parametrize("fragments", [False, True], ids=["one frame", "fragments"])
def test_a_frame_that_comes_byte_by_byte_is_cut_off(arena, monkeypatch, fragments: bool) -> None:
    with upgraded(arena) as peer:
        monkeypatch.setattr(sockets, "FRAME_SECONDS", 0.5)
        if fragments:
            peer.sendall(frame(b"x", opcode=2, fin=False))
        else:
            peer.sendall(frame(b"x", opcode=2, fin=True, announced=1000))
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(60):
                peer.sendall(frame(b"x", opcode=0, fin=False) if fragments else b"x")
                time.sleep(0.05)
        assert cut(peer)
        assert time.monotonic() - began < 15


def test_endless_empty_fragments_cost_no_memory(arena) -> None:
    with upgraded(arena) as peer:
        peer.sendall(frame(b"", opcode=2, fin=False))
        with contextlib.suppress(OSError):
            for _ in range(sockets.FRAGMENTS + 10):
                peer.sendall(frame(b"", opcode=0, fin=False))
        assert cut(peer)
    assert until(lambda: healthy(arena))


def test_a_slow_line_may_send_one_frame_after_another_without_a_pause(arena, monkeypatch) -> None:
    """What takes longer than the limit in all is not cut off as long as each message is whole in time."""
    with upgraded(arena) as peer:
        monkeypatch.setattr(sockets, "FRAME_SECONDS", 1.0)
        whole = frame(wire.encode(wire.act("none", 1, np.zeros((1, 1), np.float32))), opcode=2, fin=True)
        stream = whole * 40
        for at in range(0, len(stream), 97):  # never at the end of a frame
            peer.sendall(stream[at : at + 97])
            time.sleep(0.03)
        assert not cut(peer, 0.3)


def test_of_a_frame_of_a_gibibyte_no_more_than_the_limit_is_read(arena) -> None:
    with upgraded(arena) as peer:
        sent, piece = 0, b"\0" * 65536
        peer.settimeout(10)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        peer.sendall(frame(b"", opcode=2, fin=True, announced=2**30))
        try:
            while sent < 2**30:
                sent += peer.send(piece)
        except OSError:
            pass
        # What the sockets' own buffers held is in it.
        assert sent <= wire.RAW_FRAME_LIMIT
        assert cut(peer)
    assert until(lambda: healthy(arena))


def test_a_policy_that_pings_and_does_not_read_is_cut_off_and_loses_its_seat(arena) -> None:
    with upgraded(arena, deaf_line) as peer:
        assert arena.gateway.present()
        pings, sent = frame(b"x" * 125, opcode=9, fin=True) * 500, 0
        with contextlib.suppress(OSError):
            while sent < 2**26:
                peer.sendall(pings)
                sent += len(pings)
        # What is unread in the kernel is in it: some MiB.
        assert sent < 2**24
        assert until(lambda: not arena.gateway.present())
    assert until(lambda: healthy(arena))


MIB = 2**20
LARGE = 24 * MIB
"""More than the kernel holds of what nobody reads."""


class Plain:
    """An application that gives and takes bytes, on a real server, and what it saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.opened = threading.Event()
        self.server = Server(lambda url: self, lambda url: self.opened.set())  # type: ignore[arg-type,return-value]
        self.url = self.server.url

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            self.seen.append("accepted")
            await send({"type": "websocket.send", "bytes": bytes(LARGE)})
            while scope["path"] != "/leave" and (await receive())["type"] != "websocket.disconnect":
                await send({"type": "websocket.send", "bytes": bytes(LARGE)})
        elif scope["type"] == "http":
            await asyncio.sleep(1.0 if scope["path"] == "/late" else 0.0)
            size, more = 0, scope["path"] != "/large"
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.seen.append("gone")
                    return
                size, more = size + len(message["body"]), message["more_body"]
            answer = bytes(LARGE) if scope["path"] == "/large" else b"took %d" % size
            length = (b"content-length", b"%d" % len(answer))
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": answer})

    def empty(self) -> bool:
        return not self.server.server_state.connections


@pytest.fixture
def plain() -> Iterator[Plain]:
    plain = Plain()
    thread = threading.Thread(target=plain.server.serve_here, daemon=True)
    thread.start()
    assert plain.opened.wait(30)
    yield plain
    plain.server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def answer(connection: socket.socket) -> bytes:
    said = b""
    while b"took " not in said and (more := connection.recv(4096)):
        said += more
    return said


def read(connection: socket.socket, size: int, pause: float = 0.0, piece: int = 65536) -> int:
    got = 0
    while got < size and (taken := len(connection.recv(min(piece, size - got)))):
        got += taken
        time.sleep(pause)
    return got


@pytest.mark.parametrize(
    "start",
    [
        b"POST /take HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 999_000,
        b"POST /take HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
        b"GET /take HTTP/1.1\r\nHost: a\r\n\r\nPOST /take HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nx",
    ],
    ids=["of known length", "in chunks", "behind another request"],
)
@pytest.mark.parametrize("drip", [True, False], ids=["byte by byte", "nothing more"])
def test_a_body_that_stands_still_is_cut_off(plain, monkeypatch, start: bytes, drip: bool) -> None:
    monkeypatch.setattr(sockets, "BODY_SECONDS", 0.3)
    with line(plain) as connection:
        connection.sendall(start)
        with contextlib.suppress(OSError):
            for _ in range(60 * drip):
                connection.sendall(b"x")
                time.sleep(0.02)
        assert cut(connection, 5)
    assert until(lambda: "gone" in plain.seen)


def test_a_body_may_take_long_as_long_as_it_moves(plain, monkeypatch) -> None:
    monkeypatch.setattr(sockets, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(sockets, "BODY_BYTES", 10_000)
    with line(plain) as connection:
        for _ in range(2):  # the line is kept for a second one
            connection.sendall(b"POST /take HTTP/1.1\r\nHost: a\r\nContent-Length: 120000\r\n\r\n")
            for _ in range(30):
                connection.sendall(b"x" * 4000)
                time.sleep(0.05)
            assert answer(connection).endswith(b"took 120000")
        time.sleep(0.8)  # and no clock of a body goes on between them
        connection.sendall(b"GET /take HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answer(connection).endswith(b"took 0")


@pytest.mark.parametrize("asks", [True, False], ids=["asks whether to go on", "is not read"])
def test_a_body_is_not_charged_for_the_time_that_the_server_takes(plain, monkeypatch, asks: bool) -> None:
    monkeypatch.setattr(sockets, "BODY_SECONDS", 0.3)
    with line(plain) as connection:
        expect = "Expect: 100-continue\r\n" * asks
        connection.sendall(f"POST /late HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n{expect}\r\n".encode())
        if asks:
            assert b" 100 " in connection.recv(4096)
        else:
            connection.sendall(b"x" * 100_000)
            time.sleep(1.1)
        connection.sendall(b"x" * (200_000 if asks else 100_000))
        assert answer(connection).endswith(b"took 200000")


@pytest.mark.parametrize("ending", ["keep-alive", "close"])
def test_a_peer_that_does_not_read_its_answer_is_cut_off(plain, monkeypatch, ending: str) -> None:
    monkeypatch.setattr(sockets, "WRITE_SECONDS", 0.3)
    with deaf_line(plain) as connection:
        connection.sendall(f"GET /large HTTP/1.1\r\nHost: a\r\nConnection: {ending}\r\n\r\n".encode())
        assert until(lambda: not plain.empty())
        assert until(plain.empty)


def test_an_answer_may_be_read_slowly(plain, monkeypatch) -> None:
    monkeypatch.setattr(sockets, "WRITE_SECONDS", 1.5)
    with line(plain) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert read(connection, 4 * MIB, pause=0.05) == 4 * MIB
        assert read(connection, LARGE) > LARGE - 4 * MIB


@pytest.mark.parametrize("path", ["/stay", "/leave"], ids=["by its keep-alive", "by the application"])
def test_a_websocket_that_ends_does_not_wait_for_a_peer_that_does_not_read(plain, monkeypatch, path: str) -> None:
    if path == "/stay":
        plain.server.config.ws_ping_interval = plain.server.config.ws_ping_timeout = 0.2
    else:
        monkeypatch.setattr(sockets, "WRITE_SECONDS", 0.3)
    with deaf_line(plain) as connection:
        connection.sendall(upgrade(path))
        assert until(lambda: "accepted" in plain.seen)
        assert until(plain.empty)


def test_a_peer_on_a_slow_line_may_ping(plain, monkeypatch) -> None:
    monkeypatch.setattr(sockets, "BODY_SECONDS", 0.3)  # a websocket has none
    with deaf_line(plain) as connection:
        connection.sendall(upgrade("/stay"))
        assert until(lambda: "accepted" in plain.seen)
        for again in range(2):
            if again:
                connection.sendall(frame(b"", opcode=2, fin=True))
            for _ in range(sockets.PINGS):
                connection.sendall(frame(b"", opcode=9, fin=True))
            time.sleep(0.2)
            assert not plain.empty()
            # It reads all that there is, which makes its account even.
            assert read(connection, LARGE, piece=MIB) == LARGE
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                read(connection, MIB)
            connection.settimeout(10)


def test_a_websocket_after_an_unread_answer_waits_for_it_to_be_read(plain) -> None:
    with deaf_line(plain) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n" + upgrade("/stay"))
        time.sleep(0.5)
        assert plain.seen == []
        assert read(connection, LARGE, piece=MIB) == LARGE
        assert until(lambda: plain.seen == ["accepted"])


_UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: arena\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
)


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/v1/play", "Content-Length: 4\r\n", b"400"),
        ("/v1/play", "Transfer-Encoding: chunked\r\n", b"400"),
        ("/v1/play", "".join(f"X-{i}: 1\r\n" for i in range(140)), b"431"),
        ("/v1/play", f"X-Long: {'x' * 9000}\r\n", b"431"),
        ("/v1/play?" + "x" * 9000, "", b"414"),
    ],
)
def test_a_head_that_is_no_handshake_is_answered_and_closed(tmp_path, path: str, more: str, status: bytes) -> None:
    with running(tmp_path, connections_per_address=1) as arena:
        for _ in range(3):  # each gives its place back
            with line(arena) as stranger:
                stranger.sendall(_UPGRADE.format(path=path, more=more).encode())
                answer = b""
                while piece := stranger.recv(4096):
                    answer += piece
                assert answer.split(b" ", 2)[1] == status
