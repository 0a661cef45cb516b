"""A policy dials out to an arena and waits for trials: nobody opens a port, nobody hands out an address.

Inference runs in a thread of its own, so that a slow network never looks like a dead connection; of several
observations that wait, the newest wins. A connection carries one trial after another.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from offbook.client import wire
from offbook.client.channel import BLAMES_PEER, HANDSHAKE_S, InferenceThread, dial, receive, socket_url
from offbook.client.protocol import Policy, check_chunk
from offbook.errors import ConfigError, OffbookError, SubmissionError

Report = Callable[[str], None]
logger = logging.getLogger(__name__)

_SEND_S = 10.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 0.5, 30.0
# Refusals that time may lift: the same policy may be let in later.
_PASSING = frozenset({"too_many_policies"})


def serve_policy(
    policy: Policy,
    url: str,
    token: str,
    submission: str,
    *,
    images: str | None = None,
    once: bool = False,
    on_event: Report | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Connects a policy to an arena and answers observations until the arena says that the submission is finished.

    A lost connection is dialled again with growing, jittered pauses of at most 30 s. In the main thread SIGINT and
    SIGTERM end it like `stop`. An exception in the policy ends that trial with a one-line error, not the service.

    Args:
        policy: any `Policy`; called from one thread, with one session at a time.
        url: the arena, such as `https://arena.example`.
        token: bearer token with the scope `submit`; it travels in the Authorization header only.
        submission: id of the submission that this policy plays for.
        images: codec of the images, `raw`, `jpeg` or `png`; by default raw up to 64 KiB a step, else JPEG.
        once: return when the first connection ends; an arena that cannot be reached is an error.
        on_event: called with one line of text for each thing that happens.
        stop: set it from another thread to stop within a fraction of a second.

    Raises:
        SubmissionError: the arena refuses (token, submission, protocol), or with `once` cannot be reached.
        ConfigError: address or codec cannot be used.
    """
    if images is not None and images not in wire.CODECS:
        raise ConfigError("images", expected=f"one of {', '.join(wire.CODECS)}", got=repr(images), fix="choose one")
    hello = wire.hello(policy.meta, submission, images or wire.choose_codec(policy.meta))
    wire.validate(hello)
    thread = InferenceThread()
    address = socket_url(url, "/v1/play")
    service = _Service(policy, address, token, hello, thread, once, on_event or (lambda line: None))
    try:
        asyncio.run(service.run(stop))
    finally:
        thread.close()


@dataclass(frozen=True)
class _Service:
    policy: Policy
    url: str
    token: str
    hello: Mapping[str, Any]
    thread: InferenceThread
    once: bool
    report: Report

    async def run(self, stop: threading.Event | None) -> None:
        """Runs the dialling task beside the watch for a stop."""
        stopping = asyncio.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stopping.set)

        async def watch() -> None:
            while not (stopping.is_set() or (stop is not None and stop.is_set())):
                await asyncio.sleep(0.1)

        dialling, watching = asyncio.create_task(self._dial_forever()), asyncio.create_task(watch())
        await asyncio.wait((dialling, watching), return_when=asyncio.FIRST_COMPLETED)
        watching.cancel()
        if not dialling.done():
            self.report("stopping: trials that still run count as left by the policy")
            dialling.cancel()
        try:
            await dialling
        except asyncio.CancelledError:
            self.report("stopped")

    async def _dial_forever(self) -> None:
        failures = 0
        while True:
            try:
                async with dial(self.url, self.token, wire.frame_limit(self.hello["images"])) as socket:
                    await self._shake_hands(socket)
                    failures = 0
                    self.report(f"connected to {self.url} as {self.hello['meta']['name']!r}: waiting for trials")
                    await _Player(self.policy, socket, self.hello["images"], self.thread, self.report).play()
            except ConnectionClosed as error:
                code, lost = error.rcvd.code if error.rcvd else 1006, str(error)
                if code == 1000:
                    reason = error.rcvd.reason if error.rcvd else ""
                    self.report(f"the arena is done with this policy{': ' if reason else ''}{reason}")
                    return
                if code in BLAMES_PEER:
                    raise self._error("to go on playing", lost, "read the reason in the arena's own words") from None
            except (OSError, TimeoutError, InvalidHandshake) as error:
                self._raise_refusal(error)
                lost = str(error) or type(error).__name__
            if self.once:
                raise self._error("an open connection", lost, "start the arena or wait for it, then run this again")
            # Half of the pause is random: a restarted arena is not met by all its policies at once.
            pause = min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2**failures) * random.SystemRandom().uniform(0.5, 1.0)
            failures = min(failures + 1, 10)
            self.report(f"no connection to {self.url} ({lost}): trying again in {pause:.1f} s")
            await asyncio.sleep(pause)

    async def _shake_hands(self, socket: ClientConnection) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await socket.send(wire.encode(self.hello))
                answer = await receive(socket, wire.FRAME_LIMIT, frozenset({"ready", "error"}))
        except wire.WireError as error:
            raise self._error("version 1 of the protocol", error.reason, "update the older of the two sides") from None
        if answer["type"] == "error" and answer["code"] in _PASSING:
            raise ConnectionRefusedError(answer["message"])
        if answer["type"] == "error":
            fix = "check the submission id and the policy's description"
            raise self._error("to be accepted", f"{answer['code']}: {answer['message']}", fix)

    def _raise_refusal(self, error: Exception) -> None:
        """Raises where trying again cannot help."""
        status = error.response.status_code if isinstance(error, InvalidStatus) else 0
        if 400 <= status < 500 and status not in (408, 425, 429):
            fixes = {
                401: "check the token: it may be mistyped, expired or revoked",
                403: "use a token with the scope 'submit' of the submission's owner",
                404: "check the address of the arena",
            }
            fix = fixes.get(status, "check address, token and submission")
            raise self._error("to be let in", f"HTTP status {status}", fix) from None

    def _error(self, expected: str, got: str, fix: str) -> SubmissionError:
        return SubmissionError(f"arena at {self.url}", expected=expected, got=got, fix=fix)


class _Player:
    """One connection of a policy: takes frames in, keeps the newest observation of the trial, sends answers out."""

    def __init__(
        self, policy: Policy, socket: ClientConnection, images: str, thread: InferenceThread, report: Report
    ) -> None:
        self._policy, self._socket, self._thread, self._report = policy, socket, thread, report
        self._limit = wire.frame_limit(images)
        self._session: str | None = None  # of the trial that runs
        self._episode = 0  # counts beginnings and ends: answers to an earlier one are dropped
        self._prompt: str | None = None  # of a trial that the policy has not heard of yet
        self._newest: dict[str, Any] | None = None
        self._wake = asyncio.Event()

    async def play(self) -> None:
        """Plays until the connection closes, which it raises."""
        answering = asyncio.create_task(self._answer())
        receiving = asyncio.create_task(self._take_in())
        try:
            await asyncio.wait((answering, receiving), return_when=asyncio.FIRST_COMPLETED)
            for task in (answering, receiving):  # where one made the other fail, the cause comes first
                if task.done():
                    task.result()
        except asyncio.CancelledError:
            await self._socket.close(1001, "the policy stops")
            raise
        except wire.WireError as error:
            self._report(f"the arena broke the protocol: {error.reason}")
            await self._socket.close(error.code, error.reason)
            raise ConnectionResetError(error.reason) from error
        finally:
            answering.cancel()
            receiving.cancel()
            await asyncio.gather(answering, receiving, return_exceptions=True)
            if self._session is not None:
                self._report(f"{self._session}: the connection ended during the trial")

    async def _take_in(self) -> None:
        check = wire.SequenceCheck()
        while True:
            message = await receive(self._socket, self._limit, wire.FROM_ARENA - {"ready"})
            check(message)
            kind, session = message["type"], message.get("session", "")
            if kind == "reset":
                self._begin(session, message["prompt"])
                self._report(f"{session}: trial begins")
            elif kind == "obs" and session == self._session:
                self._newest = message
            elif kind == "obs":
                await self._send(wire.error("no_reset", "an observation came before the reset", session))
            elif kind == "end":
                if session == self._session:
                    self._begin(None, None)
                self._report(f"{session}: trial ended, {message['outcome']}")
            else:
                self._report(f"{session or 'arena'}: {message['code']}: {message['message']}")
            self._wake.set()

    def _begin(self, session: str | None, prompt: str | None) -> None:
        """Another trial, or none, takes the place of the one that runs."""
        self._session, self._prompt, self._newest = session, prompt, None
        self._episode += 1

    async def _answer(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            # Of what arrives meanwhile the newest waits for the next call.
            while (session := self._session) is not None and (self._prompt is not None or self._newest is not None):
                episode, prompt, message = self._episode, self._prompt, self._newest
                self._prompt = self._newest = None
                call = self._thread.submit(_decide, self._policy, session, prompt, message)
                chunk, fault = await asyncio.wrap_future(call)
                if fault:
                    self._report(f"{session}: {fault}")
                if episode != self._episode:
                    continue
                if fault:
                    self._begin(None, None)
                    await self._send(wire.error("policy_error", fault, session))
                elif chunk is not None and message is not None:
                    await self._send(wire.act(session, message["seq"], chunk))

    async def _send(self, message: Mapping[str, Any]) -> None:
        # An arena that stops reading must not make answers pile up here; it would not read a goodbye either.
        try:
            async with asyncio.timeout(_SEND_S):
                await self._socket.send(wire.encode(message))
        except TimeoutError:
            self._socket.transport.abort()
            raise TimeoutError(f"the arena has not read for {_SEND_S:g} s") from None


def _decide(
    policy: Policy, session: str, prompt: str | None, message: Mapping[str, Any] | None
) -> tuple[NDArray[np.float32] | None, str]:
    """Runs in the inference thread: the answer, where one is asked for, and one line when the policy failed."""
    try:
        if prompt is not None:
            policy.reset([session], [prompt])
        if message is None:
            return None, ""
        # NaN passes: the robot's own guard refuses such steps one by one and names them on the run page.
        answer = policy.infer(wire.read_observation(message, policy.meta))
        return check_chunk(answer, 1, policy.meta, finite=False)[0], ""
    except wire.WireError as error:
        return None, error.reason
    except OffbookError as error:
        return None, str(error)
    except Exception as error:  # the policy is user code: its exception ends this trial, not the service
        logger.exception("the policy raised an exception")
        return None, f"the policy raised {type(error).__name__}: {error}".splitlines()[0]
