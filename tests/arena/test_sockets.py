"""Connections that only cost: too many of one address, and heads of requests that never end."""

from __future__ import annotations

import contextlib
import socket
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from arena_server import META, running, until
from websockets.sync.client import connect

from offbook.client import wire
from offbook.service import sockets

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


@contextmanager
def upgraded(arena):
    """A policy that is seated, as a bare socket: its frames can be ill-formed."""
    entry = arena.submit("ada")
    head = (
        f"GET /v1/play HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {arena.tokens['ada']}\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    with line(arena) as connection:
        connection.sendall(head.encode())
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
