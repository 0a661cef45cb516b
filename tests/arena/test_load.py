"""What many and large requests cost the arena's process: its memory stays flat, and it answers the others."""

from __future__ import annotations

import contextlib
import hashlib
import random
import resource
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from arena_server import META, until
from server_processes import found_arena
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from offbook.arena.serving import served_apart
from offbook.client import wire
from offbook.client.submit import ArenaClient

pytestmark = [pytest.mark.service, pytest.mark.faults]

MIB = 2**20


@dataclass
class Process:
    """An arena in a process of its own."""

    url: str
    tokens: dict[str, str]
    number: int

    def memory(self) -> int:
        """Bytes that it holds in memory."""
        return int(Path(f"/proc/{self.number}/statm").read_text().split()[1]) * resource.getpagesize()

    def dial(self, path: str = "/v1/play", role: str = "ada", **options: object) -> connect:
        """A websocket to the arena."""
        options = {"proxy": None, "compression": None, "open_timeout": 30} | options
        headers = {"Authorization": f"Bearer {self.tokens.get(role, role)}"}
        return connect(self.url.replace("http", "ws") + path, additional_headers=headers, **options)

    def submit(self, role: str = "ada") -> str:
        with ArenaClient(self.url, self.tokens[role]) as client:
            body = {"benchmark": "reach", "name": "mine", "kind": "remote", "trials": 1}
            return str(client.request("POST", "/v1/submissions", json=body)["id"])


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Process]:
    _, database, tokens = found_arena(tmp_path / "arena", policies_per_user=500)
    database.close()
    with served_apart(tmp_path / "arena") as (url, process):
        yield Process(url, tokens, process.pid)


def send_large(arena: Process, megabytes: int) -> int:
    """Uploads a file piece by piece; returns by how much the arena's memory grew meanwhile at most."""
    head = struct.pack("<Q", 2) + b"{}"
    pieces = [head, *[bytes([i % 251]) * MIB for i in range(megabytes)]]
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()
    before, most, done = arena.memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, arena.memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        headers = {"Authorization": f"Bearer {arena.tokens['ada']}", "Content-Type": "application/octet-stream"}
        answer = httpx.put(
            f"{arena.url}/v1/blobs/{digest}", content=iter(pieces), headers=headers, timeout=300, trust_env=False
        )
    finally:
        done.set()
        thread.join()
    assert answer.status_code == 201, answer.text
    return most - before


def test_a_large_upload_is_not_held_in_memory(arena: Process) -> None:
    send_large(arena, 8)
    assert send_large(arena, 48) < 24 * MIB


@pytest.mark.slow
def test_an_upload_of_256_mib_takes_less_than_64_mib_of_memory(arena: Process) -> None:
    send_large(arena, 8)
    assert send_large(arena, 255) < 64 * MIB


def pester(arena: Process, seed: int, frames: int, entry: str) -> None:
    """Sends mutated frames, two over each connection, some of them after a sound `hello`."""
    stream = random.Random(seed)
    hello = wire.encode(wire.hello(META, entry, "raw"))
    kinds = [hello, wire.encode(wire.act("trial", 1, np.ones((1, 1), np.float32)))]
    for turn in range(frames // 2):
        # Whichever frame it is that the arena does not bear, the line may be gone at any point here.
        with contextlib.suppress(ConnectionClosed, OSError), arena.dial() as socket:
            if turn % 2:
                socket.send(hello)
            for _ in range(2):
                frame = bytearray(kinds[turn % 2])
                for _ in range(stream.randint(1, 4)):
                    frame[stream.randrange(len(frame))] = stream.randrange(256)
                socket.send(bytes(frame))


def fuzz(arena: Process, frames: int) -> None:
    entries = [arena.submit() for _ in range(4)]
    pester(arena, 0, 40, entries[0])
    before = arena.memory()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: pester(arena, i, frames // 4, entries[i]), range(4)))
    assert arena.memory() - before < 32 * MIB
    text = httpx.get(f"{arena.url}/metrics", trust_env=False).text
    broken = next(line for line in text.splitlines() if line.startswith('offbook_broken_frames_total{sender="policy"}'))
    assert float(broken.split()[-1]) > frames / 8
    assert 'status="500"' not in text


def test_broken_frames_from_many_sides_cost_no_memory(arena: Process) -> None:
    fuzz(arena, 160)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_thousand_broken_frames_cost_no_memory(arena: Process) -> None:
    fuzz(arena, 20_000)


def idle(arena: Process, policies: int) -> None:
    """Connects policies that wait, and sees that pages come as before and that all are let go at the end."""
    before = arena.memory()
    with contextlib.ExitStack() as stack:
        for _ in range(policies):
            socket = stack.enter_context(arena.dial())
            socket.send(wire.encode(wire.hello(META, arena.submit(), "raw")))
            assert wire.decode(socket.recv(timeout=20))["type"] == "ready"
        assert arena.memory() - before < policies * MIB / 4 + 8 * MIB
        text = httpx.get(f"{arena.url}/metrics", trust_env=False).text
        assert f"offbook_policies {policies}\n" in text
        assert httpx.get(f"{arena.url}/queue", trust_env=False).status_code == 200
    until(lambda: "offbook_policies 0\n" in httpx.get(f"{arena.url}/metrics", trust_env=False).text, 60)


def test_policies_that_wait_cost_little(arena: Process) -> None:
    idle(arena, 12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_policies_that_wait_cost_little(arena: Process) -> None:
    idle(arena, 200)


def test_a_peer_that_stops_reading_is_given_up_and_costs_bounded_memory(arena: Process) -> None:
    entry = arena.submit()
    # A client that has one message waiting reads no more from its line.
    with arena.dial(max_queue=1) as policy, ArenaClient(arena.url, arena.tokens["lab"]) as lab:
        policy.send(wire.encode(wire.hello(META, entry, "raw")))
        assert wire.decode(policy.recv(timeout=20))["type"] == "ready"
        body = {"robot": "arm", "worker": "arm-1", "instance": "a", "capabilities": {}}
        given = until(lambda: lab.request("POST", "/v1/leases", json=body))
        with arena.dial(f"/v1/relay/{given['trial']}.{given['fence']}", "lab") as robot:
            robot.recv(timeout=20)
            robot.send(wire.encode(wire.reset("trial", "walk")))
            before, state = arena.memory(), np.zeros(400_000, np.float32)
            message = {"type": "obs", "session": "trial", "t": 0.0, "state": state, "images": {}, "deadline_ms": 1.0}

            def show() -> None:
                for seq in range(1, 600):
                    robot.send(wire.encode(message | {"seq": seq}))
                    time.sleep(0.05)

            with pytest.raises(ConnectionClosed, match="the policy left"):
                show()
            assert arena.memory() - before < 64 * MIB


def test_strangers_leave_nothing_behind(arena: Process) -> None:
    """Wrong tokens end in 401, then 429, and cost no memory."""
    before, codes = arena.memory(), []
    for _ in range(60):
        with pytest.raises(InvalidStatus) as caught, arena.dial(role="ob_00000000_" + "a" * 43):
            pass
        codes.append(caught.value.response.status_code)
    assert (codes[0], codes[-1], set(codes)) == (401, 429, {401, 429})
    assert arena.memory() - before < 16 * MIB
