"""A policy on another machine as a robot sees it: reached through the arena's relay, an ordinary `Policy`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from offbook.client import wire
from offbook.client.channel import BLAMES_PEER, CLOSE_S, dial, receive, socket_url
from offbook.client.protocol import Observation, PolicyMeta, check_chunk
from offbook.errors import OffbookError, PolicyError, RobotError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class RemotePolicy:
    """A policy on another machine, reached through the arena's relay: an ordinary `Policy` of one session.

    Every wait is bounded. What the policy does wrong (silence, an error, hanging up, a broken answer) raises
    PolicyError; a relay or arena that fails raises RobotError, since nobody's policy is to blame.

    Args:
        url: the arena, such as `http://127.0.0.1:8000`.
        token: bearer token with the scope `worker`.
        trial: id of the leased trial.
        deadline_s: longest wait for one answer; also told to the policy.
        ready_s: longest wait until the policy is there.
    """

    def __init__(self, url: str, token: str, trial: str, *, deadline_s: float = 10.0, ready_s: float = 30.0) -> None:
        self._url, self._deadline_s = socket_url(url, f"/v1/relay/{trial}"), deadline_s
        self._session, self._seq = "", 0
        self._socket: ClientConnection | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="offbook-relay", daemon=True)
        self._thread.start()
        try:
            self.meta, self._images = self._call(self._open(token), ready_s)
        except BaseException:
            self._stop_loop()
            raise

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Begins the episode; exactly one session."""
        (self._session,), (prompt,) = sessions, prompts
        self._call(self._tell(wire.reset(self._session, prompt)), self._deadline_s)

    def infer(self, observation: Observation) -> NDArray[np.float32]:
        """Sends one observation (B = 1) and waits for its chunk, shape (1, N, A); NaN is left to the robot's guard.

        Raises:
            PolicyError: no sound answer came in time.
            RobotError: the arena failed.
        """
        if observation.sessions != (self._session,):
            fix = "call reset() with this session first"
            got = f"session {observation.sessions}"
            raise PolicyError(self._url, expected=f"session {self._session!r} alone", got=got, fix=fix)
        self._seq += 1
        message = wire.obs(
            self._session, self._seq, observation, deadline_ms=1000 * self._deadline_s, images=self._images
        )
        chunk = self._call(self._ask(message), self._deadline_s)
        return check_chunk(chunk[None], 1, self.meta, finite=False)

    def close(self, outcome: str = "") -> None:
        """Tells the policy how the episode ended and hangs up; safe to call twice."""
        if self._loop.is_closed():
            return
        try:
            if self._session and outcome:
                self._call(self._send(wire.end(self._session, outcome)), CLOSE_S)
            if self._socket is not None:
                self._call(self._socket.close(), 2 * CLOSE_S)
        except OffbookError:
            logger.debug("the relay was gone before its end", exc_info=True)
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        if self._socket is not None:
            self._loop.call_soon_threadsafe(self._socket.transport.abort)

        async def cancel_all() -> None:
            # An inference that still waits in another thread must hear that nothing will come.
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _open(self, token: str) -> tuple[PolicyMeta, str]:
        try:
            self._socket = await dial(self._url, token, wire.FRAME_LIMIT)
        except TimeoutError as error:
            raise ConnectionError("no answer to the handshake") from error
        message = await self._next(frozenset({"ready", "error"}))
        if "meta" not in message:
            raise RobotError(self._url, expected="the policy's description", got="none", fix="update the arena")
        return PolicyMeta.from_json(message["meta"]), message["images"]

    async def _send(self, message: Mapping[str, Any]) -> None:
        if self._socket is not None:
            await self._socket.send(wire.encode(message, wire.frame_limit(self._images)))

    async def _tell(self, message: Mapping[str, Any]) -> None:
        # Of a line that is closed, what came before tells why; where nothing did, reading it raises the same.
        with contextlib.suppress(ConnectionClosed):
            await self._send(message)

    async def _ask(self, message: Mapping[str, Any]) -> NDArray[np.float32]:
        await self._tell(message)
        while True:
            answer = await self._next(frozenset({"act", "error"}))
            if answer["session"] != self._session or answer["seq"] > self._seq:
                got = f"an answer to observation {answer['seq']} of {answer['session'][:40]!r}"
                fix = "answer what was asked"
                raise PolicyError(self._url, expected=f"one to {self._seq}", got=got, fix=fix)
            if answer["seq"] == self._seq:
                return answer["chunk"]  # type: ignore[no-any-return]  # the wire has checked it

    async def _next(self, allowed: frozenset[str]) -> dict[str, Any]:
        if self._socket is None:
            raise self._closed()
        message = await receive(self._socket, wire.FRAME_LIMIT, allowed)
        if message["type"] == "error":
            got = f"{message['code']}: {message['message']}"
            raise PolicyError(self._url, expected="an answer of the policy", got=got, fix="see the policy's own log")
        return message

    def _call(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """Runs a coroutine in the relay's thread, for at most `seconds`, and sorts what can go wrong by blame."""

        async def bounded() -> T:
            async with asyncio.timeout(seconds):
                return await work

        if self._loop.is_closed():
            work.close()
            raise self._closed()
        try:
            return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()
        except concurrent.futures.CancelledError:
            raise self._closed() from None
        except TimeoutError:
            fix = "speed the policy up or give it a longer deadline"
            raise PolicyError(self._url, expected=f"an answer within {seconds:g} s", got="none", fix=fix) from None
        except ConnectionClosed as error:
            kind = PolicyError if error.rcvd and error.rcvd.code in BLAMES_PEER else RobotError
            fix = "see the arena's log"
            raise kind(self._url, expected="an open connection", got=str(error), fix=fix) from None
        except (OSError, InvalidHandshake, wire.WireError) as error:
            fix = "see the arena's log"
            raise RobotError(self._url, expected="a working relay", got=str(error), fix=fix) from error

    def _closed(self) -> RobotError:
        return RobotError(self._url, expected="an open relay", got="a closed one", fix="make a new RemotePolicy")
