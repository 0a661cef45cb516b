"""Runs an arena's application on a port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from offbook.arena.app import create_app
from offbook.arena.sandbox import prove
from offbook.arena.service import Settings
from offbook.arena.sockets import protocols
from offbook.client.wire import RAW_FRAME_LIMIT
from offbook.errors import ConfigError


class Server(uvicorn.Server):
    """A server that says when it is open, and closes the live streams of its pages before it waits for them.

    Args:
        settings: of the arena.
        announce: called once with the address.
        host: to listen on.
        port: to listen on; 0 for any free one.
        advertise: where workers reach this server itself, when several share the database; `"here"` for its own port.

    Raises:
        ConfigError: the port cannot be had, or the sandbox that the settings want does not hold.
    """

    def __init__(
        self,
        settings: Settings,
        announce: Callable[[str], None],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str = "",
    ) -> None:
        if settings.sandbox:
            prove()
        self._announce = announce
        self._socket = _listen(host, port)
        port = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._app = create_app(settings, url=self.url if advertise == "here" else advertise)
        http, websocket = protocols(settings.connections_per_address)
        super().__init__(
            uvicorn.Config(
                self._app,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                ws=websocket,
                ws_max_size=RAW_FRAME_LIMIT,
                ws_per_message_deflate=False,
                ws_ping_interval=10.0,
                ws_ping_timeout=20.0,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=64 * 1024,
                http=http,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the port and says so."""
        await super().startup(sockets)
        if not self.should_exit:
            self._announce(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the streams that would never end by themselves, then everything else."""
        self._app.state.feed.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal closes the arena; a second one does not wait for what is still open."""
        self.force_exit, self.should_exit = self.should_exit, True

    def serve_here(self) -> None:
        """Serves until a signal, or until `should_exit` is set."""
        asyncio.run(self.serve([self._socket]))


def serve_arena(
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    advertise: str = "",
    announce: Callable[[str], None],
) -> str:
    """Serves an arena until it is interrupted; returns the address at which it was open.

    Raises:
        ConfigError: the port cannot be had, or the database cannot be used.
    """
    server = Server(settings, announce, host=host, port=port, advertise=advertise)
    server.serve_here()
    if not server.started:
        raise ConfigError(f"arena in {settings.folder}", expected="to start", got="a failure that is told above",
                          fix="check database and blob store in arena.json")  # fmt: skip
    return server.url


@contextlib.contextmanager
def served_apart(
    folder: Path, *words: str, prefix: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An arena's server in a process of its own, for measurements and tests; its log is `server.log` in the folder.

    Args:
        folder: of the arena.
        words: further flags of `offbook arena serve`, such as `--port`, which is any free one by default.
        prefix: a command in front, such as one that enters a network namespace.

    Yields:
        The address at which it is open, and the process.

    Raises:
        ConfigError: it did not start.
    """
    log = folder / "server.log"
    start = [*prefix, sys.executable, "-m", "offbook.cli.main", "arena", "serve", str(folder), "--port", "0", *words]
    with log.open("wb") as file:
        process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=file)
    try:
        while (found := re.search(rb"open at (\S+)", log.read_bytes())) is None:
            if process.poll() is not None:
                said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                raise ConfigError(f"arena in {folder}", expected="to start", got=said[-1], fix=f"read {log}")
            time.sleep(0.05)
        yield found[1].decode(), process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port}", expected="an address and a free port of this machine", got=str(error),
                          fix="choose another with --port or --host") from error  # fmt: skip
    return listener
