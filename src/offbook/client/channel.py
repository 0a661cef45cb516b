"""What both ends of the play channel share: dialling out with a token, reading frames, and a thread for inference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI

from offbook.client import wire
from offbook.client.addresses import split_address
from offbook.errors import ConfigError

T = TypeVar("T")

HANDSHAKE_S, CLOSE_S = 10.0, 2.0
# Websocket close codes that blame the peer; any other way to lose a connection blames the line or the arena.
BLAMES_PEER = frozenset({1000, 1003, 1007, 1008, 1009})


class InferenceThread:
    """One daemon thread that runs calls in order: a policy that never answers cannot keep the process alive.

    Example:
        >>> thread = InferenceThread()
        >>> thread.submit(sum, [1, 2]).result()
        3
        >>> thread.close()
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="offbook-inference", daemon=True).start()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Runs `function(*args)` in the thread; the result or exception arrives in the future."""
        future: Future[T] = Future()
        self._calls.put((future, function, args))
        return future

    def close(self) -> None:
        """Ends the thread after the calls that wait; does not wait for it."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, args = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except BaseException as error:  # handed to whoever waits for the answer
                    future.set_exception(error)


def socket_url(url: str, path: str) -> str:
    """The websocket address of a path of an arena.

    Args:
        url: `http(s)://` or `ws(s)://` address of the arena; a path of its own (a prefix, or `path` itself) is kept.
        path: such as `/v1/play`.

    Raises:
        ConfigError: the address has another form, or carries a user name or password.

    Example:
        >>> socket_url("https://arena.example", "/v1/play")
        'wss://arena.example/v1/play'
    """
    parts = split_address(url)
    schemes = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
    if parts.scheme not in schemes or not parts.hostname or parts.username or parts.query:
        shown = f"{parts.scheme}://{parts.hostname or ''}"
        expected = "http(s)://HOST[:PORT] or ws(s)://HOST[:PORT], with the token given apart"
        fix = "pass the address that the arena printed when it started"
        raise ConfigError("arena address", expected=expected, got=repr(shown), fix=fix)
    prefix = parts.path.rstrip("/").removesuffix(path)
    return f"{schemes[parts.scheme]}://{parts.netloc}{prefix}{path}"


class _Connect(connect):
    """A connection to the one address that was given: a token is for nobody else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def dial(url: str, token: str, limit: int) -> connect:
    """A websocket connection to be awaited or entered; the token travels in the Authorization header only."""
    loopback = split_address(url).hostname in ("localhost", "127.0.0.1", "::1")
    try:
        return _Connect(
            url,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            proxy=None if loopback else True,
            open_timeout=HANDSHAKE_S,
            close_timeout=CLOSE_S,
            ping_interval=10,
            ping_timeout=20,
            max_size=limit,
        )
    except InvalidURI as error:
        fix = "check host and port"
        raise ConfigError("arena address", expected="a valid address", got=repr(url), fix=fix) from error


async def receive(socket: ClientConnection, limit: int, allowed: frozenset[str]) -> dict[str, Any]:
    """The next message.

    Raises:
        WireError: the frame is not a message of an allowed type.
        ConnectionClosed: there is no next one.
    """
    frame = await socket.recv()
    if not isinstance(frame, bytes):
        raise wire.WireError(wire.REFUSED, "frame", expected="a binary message", got="text")
    return wire.decode(frame, limit, allowed=allowed)
