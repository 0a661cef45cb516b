"""Runs an arena's application on a port."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from offbook.arena.app import create_app
from offbook.arena.service import Settings
from offbook.client.wire import RAW_FRAME_LIMIT
from offbook.errors import ConfigError
from offbook.service.serving import Server


def arena_server(
    settings: Settings, announce: Callable[[str], None], *, host: str = "127.0.0.1", port: int = 0
) -> Server:
    """A server of an arena, which listens and waits to be run.

    Args:
        settings: of the arena.
        announce: called once with the address.
        host: to listen on.
        port: to listen on; 0 for any free one.

    Raises:
        ConfigError: the port cannot be had.
    """
    return Server(
        partial(create_app, settings),
        announce,
        host=host,
        port=port,
        connections=settings.connections_per_address,
        closing=lambda app: app.state.feed.close(),
        ws_max_size=RAW_FRAME_LIMIT,
        ws_per_message_deflate=False,
        ws_ping_interval=10.0,
        ws_ping_timeout=20.0,
    )


def serve_arena(
    settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, announce: Callable[[str], None]
) -> str:
    """Serves an arena until it is interrupted; returns the address at which it was open.

    Raises:
        ConfigError: the port cannot be had, or the database cannot be used.
    """
    server = arena_server(settings, announce, host=host, port=port)
    server.serve_here()
    if not server.started:
        raise ConfigError(f"arena in {settings.folder}", expected="to start", got="a failure that is told above",
                          fix="check database and blob store in arena.json")  # fmt: skip
    return server.url
