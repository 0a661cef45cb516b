"""Policies as people bring them: behind somebody else's server, and pasted from the page that says how to take part."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from arena_server import Arena, running, until
from arena_world import BENCHMARK

from foreign_servers import Foreign, websocket
from offbook.arena import submissions, views
from offbook.arena.worker import run_worker

pytestmark = pytest.mark.service

ROBOT = "gym:Pendulum-v1"


@pytest.fixture
def arena(tmp_path) -> Iterator[Arena]:
    """An arena in which a pendulum is to be held up, twice."""
    with running(tmp_path, watchdog_seconds=14.0) as arena:
        cases = {"seen": [{"scene": {}, "seed": 100 + i} for i in range(2)]}
        swing = replace(BENCHMARK, name="swing", task="hold it up", robot_class=ROBOT, splits=cases)
        with arena.database.write() as session:
            submissions.define_benchmark(session, swing)
        yield arena


@contextmanager
def outside(arena: Arena, entry: str, words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process on somebody's machine that has dialled in, with a token in its environment."""
    told = os.environ | {"OFFBOOK_TOKEN": arena.tokens["ada"]}
    process = subprocess.Popen([sys.executable, *words], env=told, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: int(entry) in arena.gateway.present() or process.poll() is not None, 60.0)
        yield process
    finally:
        process.kill()
        process.communicate()


def play(arena: Arena, entry: str, words: Sequence[str]) -> None:
    """All trials of a submission; then the arena sends its policy away, which ends well."""
    with outside(arena, entry, words) as process:
        report = run_worker(arena.url, arena.tokens["lab"], ROBOT, name="desk", max_trials=2, idle_exit=30.0)
        assert report.trials == {"done": 2}
        assert process.wait(30) == 0
    assert arena.status(entry)["state"] == "done"


def brake(request: dict) -> dict:
    """Two actions at a time, against the speed: the third number of the state."""
    return {"actions": np.full((2, 1), -0.2 * request["observation/state"][2])}


def test_a_foreign_server_plays_the_trials_of_its_submission(arena: Arena) -> None:
    foreign = Foreign(brake)
    with websocket(foreign) as address:
        entry = arena.submit(benchmark="swing", trials=2)
        bridge = ["-m", "offbook.cli.main", "policy", "bridge", "--openpi", address, "--robot", ROBOT]
        play(arena, entry, [*bridge, "--submission", entry, "--url", arena.url])
    # The first is blank: it tells what an answer holds. Then both actions of each answer are played, for 200 steps.
    asked = foreign.requests[1:]
    assert {request["prompt"] for request in asked} == {"hold it up"}
    assert len(asked) == 2 * 200 / 2


def test_what_the_page_says_in_python_plays_when_it_is_pasted(arena: Arena) -> None:
    with arena.database.read() as session:
        snippets = views.submit(session, "swing", arena.url)["snippets"]
    (code,) = (each["code"] for each in snippets if "import" in each["code"])
    entry = arena.submit(benchmark="swing", trials=2)
    play(arena, entry, ["-c", code.replace('"ID"', f'"{entry}"')])
