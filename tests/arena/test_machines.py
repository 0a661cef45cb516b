"""Workers on other machines, each a network namespace with one line to the arena's; one of the lines fails."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from server_processes import found_arena
from sqlalchemy import func, select

from offbook.arena import accounts, submissions
from offbook.arena.accounts import Principal
from offbook.arena.serving import served_apart
from offbook.arena.suites import make_suite
from offbook.arena.tables import Attempt, Result, Robot, Trial

pytestmark = [pytest.mark.service, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

ROBOT = "gym:Pendulum-v1"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """By machine its namespace: `arena`, and `m1` and `m2`, which reach only the arena at 10.77.N.1."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip is not installed")
    names = {name: f"ob{os.getpid()}{name}" for name in ("arena", "m1", "m2")}
    with ExitStack() as stack:
        for namespace in names.values():
            try:
                ip("netns", "add", namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this machine does not let us make network namespaces: {error.stderr.decode().strip()}")
            stack.callback(ip, "netns", "del", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        for n in (1, 2):
            # Both ends lie inside the namespaces: nothing of it is seen outside.
            here, there = names["arena"], names[f"m{n}"]
            ip("-n", here, "link", "add", f"to{n}", "type", "veth", "peer", "name", "up0", "netns", there)
            ip("-n", here, "addr", "add", f"10.77.{n}.1/24", "dev", f"to{n}")
            ip("-n", here, "link", "set", f"to{n}", "up")
            ip("-n", there, "addr", "add", f"10.77.{n}.2/24", "dev", "up0")
            ip("-n", there, "link", "set", "up0", "up")
        yield names


def test_workers_on_two_machines_share_the_trials_and_a_cut_line_loses_nothing(
    tmp_path: Path, machines: dict[str, str]
) -> None:
    trials = 24
    _, database, tokens = found_arena(tmp_path / "arena", lease_seconds=20.0, watchdog_seconds=12.0, fault_cap=20)
    with database.write() as session:
        submissions.define_benchmark(session, make_suite("pendulum", 8, seed=0))
        for i in range(trials // 8):
            user = accounts.find_user(session, f"user {i}", create=True)
            who = Principal(user_id=user.id, user=user.name, token_id=0, prefix="", scopes=frozenset({"admin"}))
            submissions.accept(
                session, who, submissions.Request(benchmark="pendulum", name=f"r{i}", kind="anchor", anchor="random")
            )
    inside = ("ip", "netns", "exec")

    def count(*where: object) -> int:
        with database.read() as session:
            return session.scalar(select(func.count(Result.id)).where(*where)) or 0

    with ExitStack() as stack:
        arena = served_apart(
            tmp_path / "arena", "--host", "0.0.0.0", prefix=(*inside, machines["arena"])  # of its namespace
        )  # fmt: skip
        url, _ = stack.enter_context(arena)
        port = url.rpartition(":")[2]
        for n in (1, 2):
            words = [*inside, machines[f"m{n}"], sys.executable, "-m", "offbook.cli.main", "arena", "worker"]
            words += ["--robot", ROBOT, "--name", f"m{n}", "--url", f"http://10.77.{n}.1:{port}"]
            worker = subprocess.Popen(words, env={**os.environ, "OFFBOOK_TOKEN": tokens["lab"]})
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
        wait(lambda: count() >= 4, 180)
        ip("-n", machines["m1"], "link", "set", "up0", "down")
        cut_at = count()
        wait(lambda: count() >= cut_at + 4, 180)
        time.sleep(21)
        ip("-n", machines["m1"], "link", "set", "up0", "up")
        wait(lambda: count() == trials, 300)
    with database.read() as session:
        assert session.scalar(select(func.count(Result.trial_id.distinct()))) == trials
        assert set(session.scalars(select(Trial.state))) == {"done"}
        rows = session.execute(
            select(Attempt.trial_id, Attempt.leased, Attempt.ended, Attempt.outcome, Robot.name)
            .join(Robot, Robot.id == Attempt.robot_id)
            .order_by(Attempt.leased)
        ).all()
    database.close()
    played = Counter(row.name for row in rows if row.outcome == "done")
    assert set(played) == {"m1", "m2"}
    assert {row.outcome for row in rows} <= {"done", "robot_fault", "released"}
    for key in ("trial_id", "name"):
        runs: dict[object, list[tuple[float, float]]] = {}
        for row in rows:
            runs.setdefault(getattr(row, key), []).append((row.leased, row.ended))
        for spans in runs.values():
            assert all(former[1] <= latter[0] for former, latter in itertools.pairwise(spans))


def wait(condition: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
