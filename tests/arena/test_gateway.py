"""The relay meets peers that are rude, slow, gone or not who they say; the others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from contextlib import contextmanager

import msgpack
import numpy as np
import pytest
from arena_server import META, Walker, dialled_in, running, until
from sqlalchemy.exc import OperationalError
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from offbook.arena import gateway
from offbook.arena.seats import SeatBook
from offbook.arena.tables import Seat
from offbook.arena.worker import run_worker
from offbook.client import wire
from offbook.client.protocol import Observation

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    with running(tmp_path_factory.mktemp("arena"), watchdog_seconds=10.0, policies_per_user=3) as arena:
        yield arena


@contextmanager
def dial(arena, path: str = "/v1/play", role: str = "ada", **options):
    headers = {"Authorization": f"Bearer {arena.tokens.get(role, role)}"} if role else {}
    with connect(
        arena.url.replace("http", "ws") + path,
        additional_headers=headers,
        proxy=None,
        compression=None,
        max_size=2**24,
        **options,
    ) as socket:
        yield socket


def hello(socket: ClientConnection, entry: str) -> dict:
    socket.send(wire.encode(wire.hello(META, entry, "raw")))
    return wire.decode(socket.recv(timeout=5))


def closed(socket: ClientConnection) -> tuple[int, str]:
    """How the arena ends the connection, after whatever it still says."""
    while True:
        try:
            socket.recv(timeout=10)
        except ConnectionClosed as error:
            # No closing frame at all: the line broke, which websockets call 1006.
            return (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, "")


def lease(arena, worker: str = "arm-1") -> dict:
    body = {"robot": "arm", "worker": worker, "instance": "first", "capabilities": {}}
    with arena.client("lab") as client:
        return until(lambda: client.request("POST", "/v1/leases", json=body))


def observation(seq: int, size: int = 2) -> bytes:
    seen = Observation(sessions=("trial",), state=np.full((1, size), seq, np.float32), images={}, time=np.zeros(1))
    return wire.encode(wire.obs("trial", seq, seen, deadline_ms=1000, images="raw"), wire.RAW_FRAME_LIMIT)


def act(seq: int, value: float = 1.0) -> bytes:
    return wire.encode(wire.act("trial", seq, np.full((1, 1), value, np.float32)))


@pytest.mark.parametrize(
    ("path", "role", "status"),
    [
        ("/v1/play", "", 401),
        ("/v1/play", "ob_00000000_" + "a" * 43, 401),
        ("/v1/play", "lab", 403),
        ("/v1/relay/1.1", "ada", 403),
        ("/v1/relay/1.1", "lab", 409),
        ("/v1/relay/x", "lab", 409),
        ("/v1/play?token=ob_x", "", 401),
        ("/v1/nothing", "ada", 403),
    ],
)
def test_nobody_enters_without_the_right_token(arena, path: str, role: str, status: int) -> None:
    with pytest.raises(InvalidStatus) as caught, dial(arena, path, role):
        pass
    assert caught.value.response.status_code == status


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", 1007),
        (b"\xff" * 100, 1007),
        (msgpack.packb({"type": "hello"}), 1008),
        (msgpack.packb({"type": "act", "session": "a", "seq": 1, "chunk": []}), 1008),
        (msgpack.packb({"type": "hello", "version": 99, "meta": {}, "submission": "1", "images": "raw"}), 1008),
        (msgpack.packb({"d": b"", "t": "f4", "s": [2**40, 2**40]}), 1007),
        (wire.encode(wire.hello(META, "x", "raw")) + b"\0", 1007),
        (b"\0" * (3 * 2**20), 1009),
        (b"\0" * (9 * 2**20), 1009),
        ("text", 1008),
    ],
)
def test_a_first_frame_that_is_no_hello(arena, frame, code: int) -> None:
    with dial(arena) as socket:
        with contextlib.suppress(ConnectionClosed):  # it may be refused by its first bytes
            socket.send(frame)
        # A frame that the server stops reading may break the line (1006) before the refusal is read.
        assert closed(socket)[0] in ((code, 1006) if len(frame) > wire.RAW_FRAME_LIMIT else (code,))


def test_a_peer_that_says_nothing_is_sent_away(arena, monkeypatch) -> None:
    monkeypatch.setattr(gateway, "HELLO_SECONDS", 0.3)
    with dial(arena) as socket:
        assert closed(socket) == (1008, "no hello within 0.3 s")


@pytest.mark.parametrize(
    ("role", "entry", "word"),
    [
        ("bob", None, "not_found"),
        ("ada", "999999", "not_found"),
        ("ada", "' OR 1=1", "not_found"),
        ("ada", "", "not_found"),
    ],
)
def test_a_policy_plays_for_its_owners_submission_only(arena, role: str, entry: str | None, word: str) -> None:
    own = arena.submit("ada")
    with dial(arena, role=role) as socket:
        answer = hello(socket, own if entry is None else entry)
        assert (answer["type"], answer["code"]) == ("error", word)
        assert closed(socket)[0] == 1008
    assert int(own) not in arena.gateway.present()


def test_a_finished_submission_needs_no_policy(arena) -> None:
    entry = arena.submit("ada")
    with dial(arena) as socket:
        assert hello(socket, entry)["type"] == "ready"
        with arena.client("ada") as client:
            client.cancel(entry)
        assert closed(socket) == (1000, "no trial of this submission is left")
    with dial(arena) as socket:
        assert hello(socket, entry)["code"] == "not_open"


def test_the_newest_connection_of_a_submission_counts(arena) -> None:
    entry = arena.submit("ada")
    with dial(arena) as first, dial(arena) as second:
        assert hello(first, entry)["type"] == "ready"
        assert hello(second, entry)["type"] == "ready"
        assert closed(first)[0] == 1008
        assert int(entry) in arena.gateway.connected()
    until(lambda: int(entry) not in arena.gateway.present())


def test_a_policy_that_dialled_in_elsewhere_since_is_given_no_trial_here(arena) -> None:
    entry = int(arena.submit("ada"))
    with dial(arena) as policy:
        assert hello(policy, str(entry))["type"] == "ready"
        with arena.database.read() as session:
            assert arena.gateway.leasable(session) == {entry}
        other = SeatBook(arena.database, "http://other")
        other.take(entry)
        with arena.database.read() as session:
            assert (arena.gateway.connected(), arena.gateway.leasable(session)) == ({entry}, set())
        other.leave(entry)
    until(lambda: not arena.gateway.present())


def test_a_seat_that_cannot_be_written_down_is_none(arena, monkeypatch) -> None:
    entry = arena.submit("ada")

    def away(book, submission: int) -> None:
        raise OperationalError("INSERT INTO seats", {}, OSError("the database is away"))

    with monkeypatch.context() as patched, dial(arena) as socket:
        patched.setattr(SeatBook, "take", away)
        socket.send(wire.encode(wire.hello(META, entry, "raw")))
        assert closed(socket)[0] == 1011
    until(lambda: int(entry) not in arena.gateway.present(), 5)
    with dial(arena) as socket:
        assert hello(socket, entry)["type"] == "ready"
    until(lambda: not arena.gateway.present())


def test_a_policy_that_comes_from_another_server_is_not_sent_away_before_it_is_written_down(arena, monkeypatch) -> None:
    entry, take, renew, renewed = arena.submit("ada"), SeatBook.take, SeatBook.renew, []
    take(SeatBook(arena.database, "http://other"), int(entry))

    def slow(book, submission: int) -> None:
        seen = len(renewed)
        until(lambda: len(renewed) > seen + 1)
        take(book, submission)

    monkeypatch.setattr(gateway, "RENEW_SECONDS", 0.0)
    monkeypatch.setattr(SeatBook, "take", slow)
    monkeypatch.setattr(SeatBook, "renew", lambda book, mine: renewed.append(mine) or renew(book, mine))
    with dial(arena) as socket:
        assert hello(socket, entry)["type"] == "ready"
        with pytest.raises(TimeoutError):
            socket.recv(timeout=1)
    until(lambda: not arena.gateway.present())


def test_a_policy_that_leaves_slowly_and_dials_again_stays_written_down(arena, monkeypatch) -> None:
    entry, leave, leaving, left = arena.submit("ada"), SeatBook.leave, threading.Event(), threading.Event()

    def slow(book, submission: int) -> None:
        leaving.set()
        time.sleep(0.5)
        leave(book, submission)
        left.set()

    monkeypatch.setattr(SeatBook, "leave", slow)
    with dial(arena) as socket:
        assert hello(socket, entry)["type"] == "ready"
    assert leaving.wait(10)
    with dial(arena) as socket:
        assert hello(socket, entry)["type"] == "ready"
        assert left.wait(10)
        with arena.database.read() as session:
            assert session.get(Seat, int(entry)) is not None
    until(lambda: not arena.gateway.present())


def test_a_user_has_only_so_many_seats(arena) -> None:
    with dial(arena) as a, dial(arena) as b, dial(arena) as c, dial(arena) as d:
        for socket in (a, b, c):
            assert hello(socket, arena.submit("ada"))["type"] == "ready"
        assert hello(d, arena.submit("ada"))["code"] == "too_many_policies"
        with dial(arena, role="bob") as other:
            assert hello(other, arena.submit("bob"))["type"] == "ready"
    until(lambda: not arena.gateway.present())


def test_a_revoked_token_loses_its_open_connection(arena) -> None:
    with arena.client("root") as client:
        made = client.request("POST", "/v1/tokens", json={"user": "ada", "scopes": ["submit"]})
        arena.tokens["spare"] = made["token"]
        with dial(arena, role="spare") as socket:
            assert hello(socket, arena.submit("ada"))["type"] == "ready"
            client.request("DELETE", f"/v1/tokens/{made['prefix']}")
            assert closed(socket) == (1008, "the token is no longer valid")


def test_a_worker_whose_token_is_revoked_loses_its_relay(arena) -> None:
    with arena.client("root") as client:
        made = client.request("POST", "/v1/tokens", json={"user": "lab", "scopes": ["worker"]})
        arena.tokens["spare"] = made["token"]
        with seated(arena, "spare") as (_, policy, robot, _):
            client.request("DELETE", f"/v1/tokens/{made['prefix']}")
            assert closed(robot) == (1008, "the token is no longer valid")
            assert wire.decode(policy.recv(timeout=5))["outcome"] == "robot_fault"


@contextmanager
def seated(arena, role: str = "lab"):
    """A policy and a worker, both by hand, joined by a relay."""
    entry = arena.submit("ada")
    with dial(arena) as policy:
        assert hello(policy, entry)["type"] == "ready"
        given = lease(arena)
        with dial(arena, f"/v1/relay/{given['trial']}.{given['fence']}", role) as robot:
            ready = wire.decode(robot.recv(timeout=5))
            # What the robot's side is told of the policy does not say whose it is.
            assert (ready["type"], ready["meta"]["name"]) == ("ready", given["blind_label"])
            robot.send(wire.encode(wire.reset("trial", "walk")))
            assert wire.decode(policy.recv(timeout=5))["prompt"] == "walk"
            yield entry, policy, robot, given
    with arena.client("lab") as client:
        body = {"fence": given["fence"], "kind": "needs_human", "reason": "the test is over"}
        client.request("POST", f"/v1/trials/{given['trial']}/fault", json=body)
    with arena.client("ada") as client:
        client.cancel(entry)


def test_frames_pass_in_both_directions(arena) -> None:
    with seated(arena) as (entry, policy, robot, _):
        assert int(entry) in arena.gateway.present()
        assert int(entry) not in arena.gateway.connected()
        for seq in range(1, 20):
            robot.send(observation(seq))
            assert wire.decode(policy.recv(timeout=5))["state"].tolist() == [seq, seq]
            policy.send(act(seq))
            assert wire.decode(robot.recv(timeout=5))["seq"] == seq
        robot.send(wire.encode(wire.end("trial", "done")))
        assert wire.decode(policy.recv(timeout=5)) == {"type": "end", "session": "trial", "outcome": "done"}


@contextmanager
def relayed(arena, given: dict):
    with dial(arena, f"/v1/relay/{given['trial']}.{given['fence']}", "lab") as robot:
        yield robot
    with arena.client("lab") as client:
        body = {"fence": given["fence"], "kind": "needs_human", "reason": "the test is over"}
        client.request("POST", f"/v1/trials/{given['trial']}/fault", json=body)


def test_a_policy_is_greeted_before_it_hears_of_a_trial(arena, monkeypatch) -> None:
    entry, take, reached = arena.submit("ada"), arena.gateway._book.take, threading.Event()

    def slow(submission: int) -> None:
        assert reached.wait(20)
        take(submission)

    monkeypatch.setattr(arena.gateway._book, "take", slow)
    with dial(arena) as policy:
        policy.send(wire.encode(wire.hello(META, entry, "raw")))
        with relayed(arena, lease(arena)) as robot:
            assert wire.decode(robot.recv(timeout=5))["type"] == "ready"
            robot.send(wire.encode(wire.reset("trial", "walk")))
            robot.send(observation(1))
            with pytest.raises(TimeoutError):
                policy.recv(timeout=0.5)
            reached.set()
            assert [wire.decode(policy.recv(timeout=5))["type"] for _ in range(3)] == ["ready", "reset", "obs"]
    with arena.client("ada") as client:
        client.cancel(entry)


def test_what_a_robot_sends_before_it_is_greeted_is_relayed_in_order(arena, monkeypatch) -> None:
    entry, say, sent = arena.submit("ada"), gateway._say, threading.Event()

    async def slow(socket, message) -> None:
        if "meta" in message:
            await asyncio.to_thread(sent.wait, 20)
            await asyncio.sleep(0.2)
        await say(socket, message)

    monkeypatch.setattr(gateway, "_say", slow)
    with dial(arena) as policy:
        hello(policy, entry)
        with relayed(arena, lease(arena)) as robot:
            robot.send(wire.encode(wire.reset("trial", "walk")))
            for seq in (1, 2, 3):
                robot.send(observation(seq))
            sent.set()
            heard = [wire.decode(policy.recv(timeout=5)) for _ in range(4)]
            assert [message.get("seq") for message in heard] == [None, 1, 2, 3]
            robot.send(observation(4))
            assert wire.decode(policy.recv(timeout=5))["seq"] == 4
    with arena.client("ada") as client:
        client.cancel(entry)


@pytest.mark.parametrize(("bad", "code"), [("text", 1008), (b"\xff" * 9, 1007)])
def test_what_stands_behind_a_broken_frame_is_not_passed_on(arena, bad, code: int) -> None:
    with seated(arena) as (_, policy, robot, _):
        robot.send(observation(2))
        assert wire.decode(policy.recv(timeout=5))["seq"] == 2
        policy.send(act(1))
        policy.send(bad)
        with contextlib.suppress(ConnectionClosed):  # it may be refused by then
            policy.send(act(2))
        assert closed(policy)[0] == code
        answers = [wire.decode(robot.recv(timeout=5)) for _ in range(2)]
        assert [(answer["type"], answer.get("code")) for answer in answers] == [("act", None), ("error", "policy_gone")]


def test_a_policy_that_breaks_the_rules_is_the_only_one_to_go(arena) -> None:
    with seated(arena) as (_, policy, robot, _):
        robot.send(observation(1))
        policy.recv(timeout=5)
        policy.send(act(1))
        policy.send(act(1))
        assert wire.decode(robot.recv(timeout=5))["type"] == "act"
        answer = wire.decode(robot.recv(timeout=5))
        assert (answer["type"], answer["code"]) == ("error", "policy_gone")
        assert closed(policy)[0] == 1008


def test_a_worker_that_vanishes_ends_the_episode_for_the_policy(arena) -> None:
    with seated(arena) as (entry, policy, robot, _):
        robot.close()
        assert wire.decode(policy.recv(timeout=5)) == {"type": "end", "session": "trial", "outcome": "robot_fault"}
        until(lambda: int(entry) in arena.gateway.connected())
        # What was still on its way disturbs nobody.
        policy.send(act(1))
        policy.send(act(7))


def test_a_relay_wants_the_live_lease(arena) -> None:
    with seated(arena) as (_, _, _, given):
        for name in (f"{given['trial']}.{given['fence'] + 1}", f"{given['trial']}.0", str(given["trial"])):
            with pytest.raises(InvalidStatus) as caught, dial(arena, f"/v1/relay/{name}", "lab"):
                pass
            assert caught.value.response.status_code == 409


def test_a_relay_without_the_policy_says_so(arena) -> None:
    entry = arena.submit("ada")
    with dial(arena) as policy:
        hello(policy, entry)
        given = lease(arena)
    until(lambda: int(entry) not in arena.gateway.present())
    with dial(arena, f"/v1/relay/{given['trial']}.{given['fence']}", "lab") as robot:
        assert wire.decode(robot.recv(timeout=5))["code"] == "policy_gone"
        assert closed(robot)[0] == 1000
    with arena.client("lab") as client:
        body = {"fence": given["fence"], "kind": "released", "reason": "no policy"}
        assert client.request("POST", f"/v1/trials/{given['trial']}/fault", json=body)["state"] == "queued"


def test_hostile_peers_do_not_disturb_a_trial(arena) -> None:
    entry, stop = arena.submit("bob", trials=2), threading.Event()

    def pester() -> None:
        while not stop.is_set():
            with dial(arena) as socket:
                socket.send(np.random.default_rng(0).bytes(2000))
                closed(socket)

    thread = threading.Thread(target=pester)
    with dialled_in(arena, entry, role="bob"):
        thread.start()
        try:
            report = run_worker(
                arena.url, arena.tokens["lab"], "arm", robot=Walker(50, seconds=0.005), name="calm", max_trials=2
            )
        finally:
            stop.set()
            thread.join(20)
    assert report.trials == {"done": 2}
    with arena.client("") as client:
        assert client._http.get("/metrics").text.count('offbook_broken_frames_total{sender="policy"}') == 1
