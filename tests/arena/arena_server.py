"""An arena on a free loopback port in this process, and light robots and policies to meet there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from arena_world import BENCHMARK

from offbook.arena import accounts, submissions
from offbook.arena.database import Database
from offbook.arena.service import Settings
from offbook.arena.serving import arena_server
from offbook.client.protocol import ActionSpec, FunctionPolicy, Observation, ObservationSpec, PolicyMeta
from offbook.client.serve import serve_policy
from offbook.client.submit import ArenaClient
from offbook.robots.base import ActResult, RobotSpec, Score
from offbook.service.serving import Server

OBSERVATION = ObservationSpec(state=(("place", 2),))
ACTION = ActionSpec(size=1, low=(-1.0,), high=(1.0,))
META = PolicyMeta(name="walker", observation=OBSERVATION, action=ACTION)


class Arena:
    """A running arena and a client for each role."""

    def __init__(self, server: Server, database: Database, tokens: dict[str, str]) -> None:
        self.server, self.url, self.database, self.tokens = server, server.url, database, tokens
        self.app = server.config.app

    def client(self, role: str = "ada") -> ArenaClient:
        return ArenaClient(self.url, self.tokens.get(role, ""))

    def submit(self, role: str = "ada", **more: Any) -> str:
        record = {"benchmark": "reach", "name": "mine", "kind": "remote", "trials": 1} | more
        with self.client(role) as client:
            return client.request("POST", "/v1/submissions", json=record)["id"]

    def status(self, entry: str) -> dict[str, Any]:
        with self.client("") as client:
            return client.status(entry)

    @property
    def gateway(self) -> Any:
        return self.app.state.arena.gateway


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Arena]:
    """Serves an arena in a thread until the block ends."""
    chosen = Settings(folder=folder, **settings)
    database = Database(chosen.database_url)
    database.migrate()
    tokens = {}
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
        for user, scope in (("root", "admin"), ("ada", "submit"), ("bob", "submit"), ("lab", "worker")):
            owner = accounts.find_user(session, user, create=True)
            tokens[user] = accounts.issue_token(session, owner, [scope])
    opened = threading.Event()
    server = arena_server(chosen, lambda url: opened.set())
    thread = threading.Thread(target=server.serve_here, daemon=True)
    thread.start()
    try:
        assert opened.wait(30), "the arena did not open"
        yield Arena(server, database, tokens)
    finally:
        server.should_exit = True
        thread.join(30)
        database.close()
    assert not thread.is_alive(), "the arena did not close"


class Walker:
    """A robot of the class arm: it walks along a line by what it is told; fast, and easy to make fail."""

    def __init__(self, steps: int = 5, *, seconds: float = 0.0, simulated: bool = True) -> None:
        self.spec = RobotSpec(
            name="arm", observation=OBSERVATION, action=ACTION, rate_hz=50.0, max_steps=steps, simulated=simulated
        )
        self.prompt = "walk"
        self.seconds = seconds
        self.resets: list[tuple[Any, int]] = []
        self.stops: list[tuple[float, str]] = []
        self.steps, self.place, self.moved = 0, 0.0, 0.0
        self.on_step: Callable[[int], None] = lambda step: None

    def reset(self, scene: Any, seed: int) -> Observation:
        self.resets.append((scene, seed))
        self.steps, self.place = 0, 0.0
        return self.observe()

    def observe(self) -> Observation:
        state = np.array([[self.place, self.steps]], np.float32)
        return Observation(sessions=("",), state=state, images={}, time=np.array([self.steps / 50]))

    def act(self, action: np.ndarray) -> ActResult:
        self.on_step(self.steps)
        time.sleep(self.seconds)
        self.moved = time.monotonic()
        self.steps += 1
        self.place += float(action[0])
        return ActResult(applied=action, reward=float(action[0]), done=self.steps >= self.spec.max_steps)

    def hold(self) -> ActResult:
        return self.act(np.zeros(1, np.float32))

    def frame(self) -> np.ndarray:
        return np.full((32, 48, 3), min(255, 20 * self.steps), np.uint8)

    def score(self) -> Score:
        return Score(value=self.place / self.spec.max_steps, success=self.place >= self.spec.max_steps - 0.5)

    def stop(self, reason: str) -> None:
        self.stops.append((time.monotonic(), reason))

    def close(self) -> None:
        pass


@contextmanager
def dialled_in(
    arena: Arena,
    entry: str,
    function: Callable[..., Any] = lambda state, images: np.ones(1, np.float32),
    **options: Any,
) -> Iterator[list[str]]:
    """A policy that dials in from a thread; yields the lines that it reports."""
    stop, lines, failures = threading.Event(), [], []

    def serve() -> None:
        try:
            serve_policy(
                FunctionPolicy(options.pop("meta", META), function),
                arena.url,
                arena.tokens[options.pop("role", "ada")],
                entry,
                stop=stop,
                on_event=lines.append,
            )
        except Exception as error:
            failures.append(error)
            lines.append(f"failed: {error}")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        until(lambda: int(entry) in arena.gateway.present() or failures or not thread.is_alive())
        yield lines
    finally:
        stop.set()
        thread.join(10)


def until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found
