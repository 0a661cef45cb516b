"""Runs an application on a port."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from offbook.errors import ConfigError
from offbook.service.sockets import protocols


class Server(uvicorn.Server):
    """A server that says when it is open, and closes streams without an end before it waits for them.

    Args:
        make_app: called when the port is had, and gives the application.
        announce: called once with the address.
        host: to listen on.
        port: to listen on; 0 for any free one.
        connections: most connections of one address at once.
        closing: ends the streams that would never end by themselves.
        options: more settings of uvicorn, such as those of websockets.

    Raises:
        ConfigError: the port cannot be had.
    """

    def __init__(
        self,
        make_app: Callable[[], FastAPI],
        announce: Callable[[str], None],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        connections: int = 1000,
        closing: Callable[[FastAPI], None] = lambda app: None,
        **options: Any,
    ) -> None:
        self._announce, self._closing = announce, closing
        self._socket = _listen(host, port)
        port = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._app = make_app()
        http, websocket = protocols(connections)
        super().__init__(
            uvicorn.Config(
                self._app,
                log_config=None,  # which would close the handlers of whatever program this runs in
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                ws=websocket,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=64 * 1024,
                http=http,
                **options,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the port and says so."""
        await super().startup(sockets)
        if not self.should_exit:
            self._announce(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the endless streams, then everything else."""
        self._closing(self._app)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal closes the service; a second one does not wait for what is still open."""
        self.force_exit, self.should_exit = self.should_exit, True

    def serve_here(self) -> None:
        """Serves until a signal, or until `should_exit` is set."""
        asyncio.run(self.serve([self._socket]))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port}", expected="an address and a free port of this machine", got=str(error),
                          fix="choose another with --port or --host") from error  # fmt: skip
    return listener
