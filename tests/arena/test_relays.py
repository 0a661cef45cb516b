"""Whoever holds a policy or a trial longer than is due does not keep it from the others."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from contextlib import contextmanager

import pytest
from arena_server import META, Walker, running, until
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from test_gateway import act, closed, dial, hello, lease, observation
from websockets.exceptions import ConnectionClosed

from offbook.arena import gateway, worker
from offbook.arena.outbox import FRAMES_PER_SECOND
from offbook.arena.tables import Attempt
from offbook.arena.worker import run_worker
from offbook.client import wire

pytestmark = [pytest.mark.service, pytest.mark.faults]


@pytest.fixture
def arena(tmp_path):
    with running(tmp_path, watchdog_seconds=10.0) as arena:
        yield arena


@contextmanager
def relay(arena, given: dict):
    """A worker's line for its trial, of which the policy has been told."""
    with dial(arena, f"/v1/relay/{given['trial']}.{given['fence']}", "lab") as robot:
        assert wire.decode(robot.recv(timeout=5))["type"] == "ready"
        robot.send(wire.encode(wire.reset("trial", "walk")))
        yield robot


@contextmanager
def leased(arena):
    """A policy that waits, and the lease of its first trial."""
    entry = arena.submit("ada")
    with dial(arena) as policy:
        assert hello(policy, entry)["type"] == "ready"
        yield policy, lease(arena)


def give_back(arena, given: dict) -> None:
    with arena.client("lab") as client:
        body = {"fence": given["fence"], "kind": "robot_fault", "reason": "it fell"}
        client.request("POST", f"/v1/trials/{given['trial']}/fault", json=body)


def test_a_worker_that_stays_after_its_lease_keeps_no_policy(arena) -> None:
    with leased(arena) as (policy, given), relay(arena, given) as robot:
        assert wire.decode(policy.recv(timeout=5))["type"] == "reset"
        give_back(arena, given)
        again = lease(arena)
        assert (again["trial"], again["fence"] > given["fence"]) == (given["trial"], True)
        assert wire.decode(policy.recv(timeout=5)) == wire.end("trial", "robot_fault")
        # Nobody is to blame for it but the line.
        assert closed(robot) == (1001, "the lease is over")
        with relay(arena, again) as other:
            assert wire.decode(policy.recv(timeout=5))["type"] == "reset"
            other.send(observation(1))
            assert wire.decode(policy.recv(timeout=5))["seq"] == 1
            policy.send(act(1))
            assert wire.decode(other.recv(timeout=5))["seq"] == 1


def test_of_two_relays_of_one_lease_only_the_newer_passes_frames(arena) -> None:
    with leased(arena) as (policy, given), relay(arena, given) as first:
        assert wire.decode(policy.recv(timeout=5))["type"] == "reset"
        with relay(arena, given) as second:
            assert wire.decode(policy.recv(timeout=5)) == wire.end("trial", "robot_fault")
            assert wire.decode(policy.recv(timeout=5))["type"] == "reset"
            assert wire.decode(first.recv(timeout=5))["code"] == "policy_gone"
            second.send(observation(7))
            assert wire.decode(policy.recv(timeout=5))["seq"] == 7


def test_an_answer_that_nobody_asked_for_is_passed_over(arena) -> None:
    with leased(arena) as (policy, given), relay(arena, given) as robot:
        assert wire.decode(policy.recv(timeout=5))["type"] == "reset"
        policy.send(act(40))  # of the attempt before, and late
        for seq in (1, 2):
            robot.send(observation(seq))
            assert wire.decode(policy.recv(timeout=5))["seq"] == seq
            policy.send(act(seq))
            assert wire.decode(robot.recv(timeout=5))["seq"] == seq


def test_a_policy_that_dials_again_does_not_wait_for_its_former_line(arena, monkeypatch) -> None:
    entry, close, waits = arena.submit("ada"), gateway._close, threading.Event()

    async def stuck(socket, code: int, reason: str) -> None:
        while reason == gateway.TAKEN and not waits.is_set():
            await asyncio.sleep(0.02)
        await close(socket, code, reason)

    monkeypatch.setattr(gateway, "_close", stuck)
    with dial(arena) as first, dial(arena) as second:
        assert hello(first, entry)["type"] == "ready"
        assert hello(second, entry)["type"] == "ready"
        assert int(entry) in arena.gateway.connected()
        waits.set()
        assert closed(first) == (1008, gateway.TAKEN)


def test_a_policy_that_floods_is_sent_away(arena) -> None:
    entry = arena.submit("ada")
    with dial(arena) as policy:
        assert hello(policy, entry)["type"] == "ready"
        with contextlib.suppress(ConnectionClosed):
            for seq in range(100 * FRAMES_PER_SECOND):
                policy.send(act(seq))
        code, reason = closed(policy)
        assert (code, "at most 500 a second" in reason) == (1008, True)


def test_a_policy_is_told_that_the_arena_failed_when_it_came(arena, monkeypatch) -> None:
    def away(*_: object) -> int:
        raise OperationalError("SELECT", {}, OSError("the database is away"))

    monkeypatch.setattr(arena.gateway, "_check_hello", away)
    with dial(arena) as policy:
        policy.send(wire.encode(wire.hello(META, "1", "raw")))
        assert closed(policy)[0] == 1011


def test_a_trial_whose_driver_never_comes_back_is_given_to_another_robot(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(worker, "HUNG_SECONDS", 1.0)
    release = threading.Event()

    def outcomes() -> list[str]:
        with arena.database.read() as session:
            return list(session.scalars(select(Attempt.outcome).order_by(Attempt.id)))

    with running(tmp_path, watchdog_seconds=4.0, lease_seconds=5.0) as arena:
        arena.submit("root", kind="anchor", anchor="random")
        robot = Walker()
        robot.on_step = lambda step: release.wait(60)
        options = {"idle_exit": 30.0, "max_trials": 1}
        first = {"robot": robot, "name": "arm-1"} | options
        thread = threading.Thread(target=lambda: run_worker(arena.url, arena.tokens["lab"], "arm", **first))
        thread.start()
        try:
            # Both workers read the limit by one name: the second gets its own once the first has fallen silent.
            until(lambda: outcomes() == ["robot_fault"], 30.0)
            assert robot.stops
            monkeypatch.setattr(worker, "HUNG_SECONDS", 60.0)
            report = run_worker(arena.url, arena.tokens["lab"], "arm", robot=Walker(), name="arm-2", **options)
            assert report.trials == {"done": 1}
        finally:
            release.set()
            thread.join(30)
        assert outcomes() == ["robot_fault", "done"]
