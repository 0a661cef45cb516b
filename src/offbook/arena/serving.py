"""Runs an arena's application on a port."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path

from offbook.arena.app import create_app
from offbook.arena.sandbox import prove
from offbook.arena.service import Settings
from offbook.client.wire import RAW_FRAME_LIMIT
from offbook.errors import ConfigError
from offbook.service.serving import Server

_ADDRESS = re.compile(r"https?://(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::(\d{1,5}))?/?", re.ASCII | re.IGNORECASE)
_LONGEST = 200  # characters of an address in the table of seats


def arena_server(
    settings: Settings,
    announce: Callable[[str], None],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    advertise: str = "",
) -> Server:
    """A server of an arena, which listens and waits to be run.

    Args:
        settings: of the arena.
        announce: called once with the address.
        host: to listen on.
        port: to listen on; 0 for any free one.
        advertise: where workers reach this server itself, when several share the database; `"here"` for its own port.

    Raises:
        ConfigError: the port cannot be had, no worker can reach what is advertised, or the sandbox that the settings
            want does not hold.
    """
    _check_advertised(advertise, host)
    if settings.sandbox:
        prove()
    return Server(
        lambda url: create_app(settings, url=url if advertise == "here" else advertise),
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
    server = arena_server(settings, announce, host=host, port=port, advertise=advertise)
    server.serve_here()
    if not server.started:
        raise ConfigError(f"arena in {settings.folder}", expected="to start", got="a failure that is told above",
                          fix="check database and blob store in arena.json")  # fmt: skip
    return server.url


def _check_advertised(address: str, host: str) -> None:
    """Refuses what other servers would hand to their workers in vain."""
    if address == "here":
        if _unspecified(host):
            raise ConfigError("--advertise here", expected="--host with an address by which others reach this machine",
                              got=f"--host {host}, which is any address of it",
                              fix="name the address itself, such as --advertise http://10.0.0.5:8000")  # fmt: skip
        return
    found = _ADDRESS.fullmatch(address[: _LONGEST + 1])
    if address and (not found or len(address) > _LONGEST or int(found[3] or 0) >= 2**16
                    or _unspecified(found[1] or found[2])):  # fmt: skip
        raise ConfigError("--advertise", expected=f"http(s)://HOST[:PORT] of at most {_LONGEST} characters, or here",
                          got=repr(address.split("@")[-1][:_LONGEST]),
                          fix="name the address at which workers of the other servers reach this one")  # fmt: skip


def _unspecified(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ip_address(host).is_unspecified
    return False


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
