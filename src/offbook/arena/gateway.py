"""The relay between a policy that dialled in and the robot that plays its trial; neither knows the other's address.

A policy takes a seat with `hello` on `/v1/play` and waits. A worker that holds a lease opens `/v1/relay/TRIAL.FENCE`;
from then on frames pass in both directions, checked on the way (`client.wire`). Queues are bounded and keep the newest
observation: a policy that reads too slowly misses some, one that does not read at all is sent away. A policy that
leaves during a trial has lost it; a worker that leaves has not, and the policy is told that the trial ended.

Where several servers share one database, each relays for the policies that dialled in to it, and tells the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketState

from offbook.arena import accounts
from offbook.arena.database import Database
from offbook.arena.outbox import SEND_SECONDS, GoneError, Outbox, Rate
from offbook.arena.seats import RENEW_SECONDS, SeatBook
from offbook.arena.submissions import check_robot
from offbook.arena.tables import IN_FLIGHT, Attempt, Submission, Token, Trial, Worker
from offbook.client import wire
from offbook.client.protocol import PolicyMeta
from offbook.service.database import now
from offbook.service.refusal import RefusedError, unknown
from offbook.service.sockets import line_of

if TYPE_CHECKING:
    from offbook.arena.service import Meters

logger = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
TAKEN = "another connection of this submission took its place"


@dataclass(eq=False)
class Seat:
    """A policy that is connected.

    Attributes:
        submission: whose trials it plays.
        user: its owner.
        token: with which it came.
        meta: what it said of itself.
        images: the codec in which it wants images.
        socket: its connection.
        outbox: frames to it.
        relay: the trial that it plays now.
        noted: whether the other servers can know of it.
    """

    submission: int
    user: int
    token: int
    meta: PolicyMeta
    images: str
    socket: WebSocket
    outbox: Outbox
    relay: Relay | None = None
    noted: bool = False


@dataclass(eq=False)
class Relay:
    """A trial that is being played: the worker's side.

    Attributes:
        trial: which one.
        fence: of the worker's lease.
        socket: the worker's connection.
        token: with which it came.
        outbox: frames to the worker.
        session: the name of the episode, once it was reset.
        asked: the number of the newest observation since then.
        ended: whether the policy was told that the episode is over.
        gone: set when the policy has left.
        answers: sees to it that the policy's answers are in order; every attempt at a trial counts anew.
    """

    trial: int
    fence: int
    socket: WebSocket
    token: int
    outbox: Outbox
    session: str = ""
    asked: int = 0
    ended: bool = True
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    answers: wire.SequenceCheck = field(default_factory=wire.SequenceCheck)


class Gateway:
    """The seats of one arena and what passes between them and the robots.

    Args:
        database: where tokens, submissions and leases are looked up.
        meters: counts frames.
        per_user: most seats of one user.
        url: where workers reach this server itself, for those that asked another one.
    """

    def __init__(self, database: Database, meters: Meters, *, per_user: int = 32, url: str = "") -> None:
        self._database, self._meters, self._per_user = database, meters, per_user
        self._book, self._renewed, self.url = SeatBook(database, url), -math.inf, url
        self._elsewhere: Mapping[int, str] = {}
        self._seats: dict[int, Seat] = {}
        self._writing = asyncio.Lock()  # rows of the book are written in the order in which seats come and go
        self._closing: set[asyncio.Task[None]] = set()

    def connected(self) -> frozenset[int]:
        """Submissions whose policies are here and idle; safe to call from any thread."""
        return frozenset(entry for entry, seat in list(self._seats.items()) if seat.relay is None)

    def leasable(self, session: Session) -> frozenset[int]:
        """Those of `connected` that have dialled in nowhere else since: a dead line here would fail their trials."""
        here = self.connected()
        return here - self._book.moved(session, here)

    def elsewhere(self) -> dict[int, str]:
        """Submissions whose policies sit at other servers, with the address at which a worker reaches them there."""
        return {entry: url for entry, url in self._elsewhere.items() if url and entry not in self._seats}

    def present(self) -> frozenset[int]:
        """Submissions whose policies are here or at another server, idle or not."""
        return frozenset([*self._seats, *self._elsewhere])

    async def play(self, socket: WebSocket, who: accounts.Principal) -> None:
        """A policy's connection from its `hello` to its end."""
        await socket.accept()
        try:
            seat = await self._welcome(socket, who)
        except RefusedError as error:
            await _say(socket, wire.error(error.error, str(error)[:400]))
            await _close(socket, wire.REFUSED, error.got)
            return
        except (wire.WireError, TimeoutError, GoneError, SQLAlchemyError) as error:
            await self._dismiss(socket, error)
            return
        former = self._seats.pop(seat.submission, None)
        self._seats[seat.submission] = seat
        try:
            if former is not None:  # not waited for: the new one may be given a trial from now on
                self._close_aside(self._leave(former, 1008, TAKEN))
            async with self._writing:
                if self._seats.get(seat.submission) is seat:
                    await run_in_threadpool(self._book.take, seat.submission)
                    seat.noted = True
            await self._serve(seat)
        except SQLAlchemyError as error:
            await self._dismiss(socket, error)
        finally:
            await self._leave(seat, 1001, "the arena stops")

    async def _serve(self, seat: Seat) -> None:
        """Frames from and to a policy until its connection ends."""
        await _say(seat.socket, wire.ready(seat.images))
        sending = asyncio.create_task(seat.outbox.run())
        receiving = asyncio.create_task(self._listen(seat))
        try:
            done, _ = await asyncio.wait((sending, receiving), return_when=asyncio.FIRST_COMPLETED)
            ending = next(iter(done)).exception()
            if isinstance(ending, GoneError) and ending.restart:
                # Not the policy's doing. A policy that says so itself gains nothing: its answer is missed in time.
                seat.relay = None
            await self._dismiss(seat.socket, ending)
        finally:
            await _cancel(sending, receiving)

    async def _welcome(self, socket: WebSocket, who: accounts.Principal) -> Seat:
        async with asyncio.timeout(HELLO_SECONDS):
            hello = wire.decode(await _receive(socket), wire.FRAME_LIMIT, allowed=frozenset({"hello"}))
        meta = PolicyMeta.from_json(hello["meta"])
        submission = await run_in_threadpool(self._check_hello, who, hello["submission"], meta)
        others = (seat for seat in self._seats.values() if seat.submission != submission)
        if sum(seat.user == who.user_id for seat in others) >= self._per_user:
            raise RefusedError(429, "too_many_policies", f"policies of {who.user}",
                               expected=f"at most {self._per_user} connected at once", got="one more",
                               fix="stop another one first")  # fmt: skip
        return Seat(
            submission=submission,
            user=who.user_id,
            token=who.token_id,
            meta=meta,
            images=hello["images"],
            socket=socket,
            outbox=Outbox(line_of(socket.scope)),
        )

    def _check_hello(self, who: accounts.Principal, name: str, meta: PolicyMeta) -> int:
        with self._database.read() as session:
            found = session.get(Submission, int(name)) if name.isascii() and name.isdigit() and len(name) < 10 else None
            if found is None or (found.user_id != who.user_id and not who.allows("admin")):
                raise unknown("submission", name[:40], "use the id that the arena gave")
            if found.kind != "remote" or found.state != "open":
                raise RefusedError(
                    409,
                    "not_open",
                    f"submission {name}",
                    expected="a remote submission with trials left",
                    got=f"a {found.kind} submission that is {found.state}",
                    fix="submit again",
                )
            check_robot(session, meta, found.robot_class)
            return found.id

    async def _listen(self, seat: Seat) -> None:
        rate = Rate()

        def take(frame: bytes) -> None:
            rate.count()
            message = wire.decode(frame, wire.FRAME_LIMIT, allowed=frozenset({"act", "error"}))
            relay = seat.relay
            # What comes after a trial has ended was on its way when it ended; nobody waits for it.
            if relay is None or relay.ended or message.get("session", relay.session) != relay.session:
                return
            if message.get("seq", 0) > relay.asked:  # likewise, of an earlier attempt at this trial
                return
            relay.answers(message)
            self._meters.frames.labels("policy").inc()
            with contextlib.suppress(GoneError):  # a worker that does not read is the worker's fault alone
                relay.outbox.put(message["type"], frame)

        await line_of(seat.socket.scope).deliver(take, lambda: _receive(seat.socket))

    async def _leave(self, seat: Seat, code: int, reason: str) -> None:
        if self._seats.get(seat.submission) is seat:
            del self._seats[seat.submission]
            async with self._writing:
                if seat.submission not in self._seats:  # else the row is already that of a policy that dialled again
                    await run_in_threadpool(self._book.leave, seat.submission)
        if seat.relay is not None:
            seat.relay.gone.set()
        await _close(seat.socket, code, reason)

    async def relay(self, socket: WebSocket, who: accounts.Principal, name: str) -> None:
        """A worker's connection for the trial that it holds; `name` is `TRIAL.FENCE` as its lease says."""
        trial, fence, submission, label = await run_in_threadpool(self._check_lease, who, name)
        await socket.accept()
        seat = self._seats.get(submission)
        if seat is None:
            await _say(socket, wire.error("policy_gone", "the policy is not connected"))
            await _close(socket, 1000, "no policy")
            return
        if (former := seat.relay) is not None:
            former.gone.set()
            self._free(seat, former)
        outbox = Outbox(line_of(socket.scope))
        relay = seat.relay = Relay(trial, fence, socket=socket, token=who.token_id, outbox=outbox)
        await _say(socket, wire.ready(seat.images, replace(seat.meta, name=label)))
        sending = asyncio.create_task(relay.outbox.run())
        receiving = asyncio.create_task(self._carry(socket, seat, relay))
        leaving = asyncio.create_task(relay.gone.wait())
        try:
            done, _ = await asyncio.wait((sending, receiving, leaving), return_when=asyncio.FIRST_COMPLETED)
            if leaving in done:
                await _cancel(sending, receiving)
                await _say(socket, wire.error("policy_gone", "the policy left during the trial"))
                await _close(socket, 1000, "the policy left")
            else:
                await self._dismiss(socket, next(iter(done)).exception(), sender="robot")
        finally:
            await _cancel(sending, receiving, leaving)
            self._free(seat, relay)

    def _free(self, seat: Seat, relay: Relay) -> None:
        """Makes a policy idle that this worker's trial kept, and tells it so; nothing more passes between them."""
        if seat.relay is relay:
            seat.relay = None
        if not relay.ended:
            relay.ended = True
            with contextlib.suppress(GoneError):
                seat.outbox.put("end", wire.encode(wire.end(relay.session, "robot_fault")))

    def _check_lease(self, who: accounts.Principal, name: str) -> tuple[int, int, int, str]:
        """Trial, fence and submission of a lease, and the label under which the worker may know its policy."""
        who.require("worker")
        trial, _, fence = name.partition(".")
        numbers = trial.isascii() and trial.isdigit() and fence.isascii() and fence.isdigit() and len(name) < 20
        with self._database.read() as session:
            found = None
            if numbers:
                found = session.execute(
                    select(Trial.id, Trial.fence, Trial.submission_id, Trial.blind_label)
                    .join(Attempt, (Attempt.trial_id == Trial.id) & (Attempt.fence == Trial.fence))
                    .join(Worker, Worker.id == Attempt.worker_id)
                    .where(Trial.id == int(trial), Trial.fence == int(fence), Trial.state.in_(IN_FLIGHT))
                    .where(Trial.lease_until > now(session), Worker.user_id == who.user_id)
                ).one_or_none()
        if found is None:
            raise RefusedError(409, "stale_fence", f"relay {name[:40]!r}",
                               expected="TRIAL.FENCE of a lease that you hold", got="none such",
                               fix="ask for a new lease")  # fmt: skip
        return found.id, found.fence, found.submission_id, found.blind_label

    async def _carry(self, socket: WebSocket, seat: Seat, relay: Relay) -> None:
        check, limit = wire.SequenceCheck(), wire.frame_limit(seat.images)

        def take(frame: bytes) -> None:
            message = wire.decode(frame, limit, allowed=wire.FROM_ROBOT)
            if seat.relay is not relay:  # it was taken away; whoever did that closes this line, and says why
                return
            check(message)
            self._meters.frames.labels("robot").inc()
            if message["type"] == "reset":
                relay.session, relay.asked, relay.ended = message["session"], 0, False
            elif message["type"] == "obs":
                relay.asked = message["seq"]
            elif message["type"] == "end":
                relay.ended = True
            try:
                seat.outbox.put(message["type"], frame)
            except GoneError:
                if not relay.gone.is_set():
                    relay.gone.set()
                    self._close_aside(self._leave(seat, 1008, "the policy does not read"))

        await line_of(socket.scope).deliver(take, lambda: _receive(socket))

    async def sweep(self) -> None:
        """Sends away who has no business here any more.

        These are policies without a trial left, policies and workers whose token was revoked or ran out, and workers
        whose lease did: a policy that such a one kept would be given no other trial.
        """
        await self._renew()
        seats = list(self._seats.values())
        if not seats:
            return
        relays = [(seat, seat.relay) for seat in seats if seat.relay is not None]
        finished, barred, held = await run_in_threadpool(self._outdated, seats, [relay for _, relay in relays])
        for seat, relay in relays:
            if relay.token in barred:
                self._close_aside(_close(relay.socket, 1008, "the token is no longer valid"))
            elif (relay.trial, relay.fence) not in held:
                self._free(seat, relay)
                self._close_aside(_close(relay.socket, 1001, "the lease is over"))
        for seat in seats:
            if seat.token in barred:
                self._close_aside(self._leave(seat, 1008, "the token is no longer valid"))
            elif seat.submission in finished and seat.relay is None:
                self._close_aside(self._leave(seat, 1000, "no trial of this submission is left"))

    async def _renew(self) -> None:
        """Tells the other servers who sits here, and hears who sits there; a policy that went there has left."""
        if time.monotonic() - self._renewed < RENEW_SECONDS:
            return
        self._renewed = time.monotonic()
        mine = {entry: seat for entry, seat in self._seats.items() if seat.noted}
        lost, self._elsewhere = await run_in_threadpool(self._book.renew, list(mine))
        for entry in lost:
            self._close_aside(self._leave(mine[entry], 1008, TAKEN))

    def _close_aside(self, closing: Coroutine[Any, Any, None]) -> None:
        """Closes without waiting: a peer that does not read must not keep the others, nor the arena's clock."""
        task = asyncio.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _outdated(self, seats: list[Seat], relays: list[Relay]) -> tuple[set[int], set[int], set[tuple[int, int]]]:
        """Of these: submissions without a trial left, tokens that are no longer valid, and leases that still are."""
        entries = {seat.submission for seat in seats}
        tokens = {seat.token for seat in seats} | {relay.token for relay in relays}
        with self._database.read() as session:
            open_ = session.scalars(
                select(Submission.id).where(Submission.id.in_(entries), Submission.state == "open")
            ).all()
            barred = session.scalars(
                select(Token.id).where(
                    Token.id.in_(tokens), Token.revoked.is_not(None) | (Token.expires <= now(session))
                )
            ).all()
            held = session.execute(
                select(Trial.id, Trial.fence)
                .where(Trial.id.in_({relay.trial for relay in relays}), Trial.state.in_(IN_FLIGHT))
                .where(Trial.lease_until > now(session))
            ).all()
        return entries - set(open_), set(barred), {(row.id, row.fence) for row in held}

    async def _dismiss(self, socket: WebSocket, error: BaseException | None, *, sender: str = "policy") -> None:
        """Ends a connection in a way that tells the peer what it did; a plain end needs no words."""
        if isinstance(error, wire.WireError):
            self._meters.broken.labels(sender).inc()
            await _say(socket, wire.error("protocol", error.reason))
            await _close(socket, error.code, error.reason)
        elif isinstance(error, TimeoutError):
            await _close(socket, 1008, f"no hello within {HELLO_SECONDS:g} s")
        elif isinstance(error, GoneError):
            await _close(socket, 1008, "the connection is no longer read")
        elif error is not None:
            logger.error("a websocket of a %s failed", sender, exc_info=error)
            await _close(socket, 1011, "the arena failed; see its log")


async def _receive(socket: WebSocket) -> bytes:
    try:
        message = await socket.receive()
    except RuntimeError as error:
        raise GoneError(str(error)) from error
    if message["type"] != "websocket.receive":
        raise GoneError("disconnected", restart=message.get("code") == 1012)
    frame = message.get("bytes")
    if frame is None:
        raise wire.WireError(wire.REFUSED, "frame", expected="a binary message", got="text")
    return bytes(frame)


async def _say(socket: WebSocket, message: dict[str, Any]) -> None:
    # Any failure to speak means that the peer has gone, which its own task notices.
    with contextlib.suppress(Exception):
        await asyncio.wait_for(socket.send_bytes(wire.encode(message)), SEND_SECONDS)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if socket.application_state is WebSocketState.CONNECTED and socket.client_state is WebSocketState.CONNECTED:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(
                socket.close(code, reason.encode("ascii", "replace")[:120].decode("ascii")), SEND_SECONDS
            )


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
