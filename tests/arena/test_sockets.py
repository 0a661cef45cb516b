"""Connections that only cost: too many of one address, and heads of requests that never end."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import httpx
import pytest
from arena_server import running, until
from websockets.sync.client import connect

from offbook.service import sockets

pytestmark = [pytest.mark.service, pytest.mark.faults]


@pytest.fixture
def arena(tmp_path, monkeypatch):
    monkeypatch.setattr(sockets, "HEAD_SECONDS", 0.3)
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
def test_a_head_that_does_not_end_is_cut_off(arena, head: bytes) -> None:
    with line(arena) as connection:
        connection.sendall(head)
        assert ended(connection)


def test_a_second_request_of_a_connection_has_no_more_time_than_the_first(arena) -> None:
    with line(arena) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while b'{"ok":true}' not in answer:
            answer += connection.recv(4096)
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
