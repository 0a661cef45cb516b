"""What the relay of an arena adds to the time from an observation to its action.

Sixteen robots each send an observation with a JPEG picture of 640 x 480 pixels 30 times a second, once through an
arena's relay and once straight to the policies, by turns; the policies answer at once. Arena, policies and robots are
three processes. Limits, for two idle cores: 0.5 % of the relayed answers come later than the next tick, and the relay
adds 5 ms to the 99th percentile and at most doubles the median; with 32 robots the arena takes one core.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from offbook.client import wire
from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.evaluate.claims import as_metric
from offbook.evaluate.stats import wilson
from offbook.runs.benchmark import Options
from offbook.runs.ledger import Claim, Metric

META = PolicyMeta(
    name="echo",
    observation=ObservationSpec(state=(("joints", 7),), cameras={"front": (480, 640)}),
    action=ActionSpec(size=7, low=(-1.0,) * 7, high=(1.0,) * 7),
)
MOST_LATE, MOST_ADDED_MS, MOST_TIMES, MOST_CORES = 0.005, 5.0, 2.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is sent.

    Attributes:
        streams: robots at once.
        rate_hz: observations of each per second.
        seconds: for which each way is measured, in all its turns together.
        turns: of each way.
    """

    streams: int = 16
    rate_hz: float = 30.0
    seconds: float = 60.0
    turns: int = 6


def run(options: Options) -> list[Claim]:
    plan = Plan()
    found = measure(plan)
    relayed, direct = (np.array(found[way]) for way in ("relay", "direct"))
    missed = wilson(int((relayed > 1000 / plan.rate_hz).sum()), len(relayed))
    added = {q: float(np.percentile(relayed, q) - np.percentile(direct, q)) for q in (50, 99)}
    times = float(np.median(relayed) / np.median(direct))
    met = missed.value <= MOST_LATE and added[99] <= MOST_ADDED_MS and times <= MOST_TIMES
    return [
        Claim(
            system="arena",
            claim=f"{plan.streams} streams of {plan.rate_hz:g} JPEG pictures a second through the relay for "
            f"{plan.seconds:g} s: at most 0.5 % late answers, at most 5 ms added to the 99th percentile, at most twice "
            "the median",
            metrics=(
                as_metric("late answers", missed, higher=False),
                Metric(name="added to the 99th percentile", value=added[99], unit="ms", higher_is_better=False),
                Metric(name="added to the median", value=added[50], unit="ms", higher_is_better=False),
                Metric(name="relayed median over straight one", value=times, higher_is_better=False),
                Metric(name="relayed, 99th percentile", value=float(np.percentile(relayed, 99)), unit="ms",
                       higher_is_better=False),
                Metric(name="processor time of the arena", value=found["cpu"], unit="cores", higher_is_better=False),
            ),
            baseline_metrics=(
                Metric(name="straight, 99th percentile", value=float(np.percentile(direct, 99)), unit="ms",
                       higher_is_better=False),
            ),
            seeds=(options.seed,),
            config=asdict(plan),
            verdict="met" if met else "missed",
        ),
        _many(options),
    ]  # fmt: skip


def _many(options: Options) -> Claim:
    """Twice as many streams, of which the arena's share of the processor counts."""
    plan = Plan(streams=32, seconds=20.0, turns=2)
    found = measure(plan)
    late = wilson(sum(value > 1000 / plan.rate_hz for value in found["relay"]), len(found["relay"]))
    return Claim(
        system="arena",
        claim=f"{plan.streams} streams of {plan.rate_hz:g} JPEG pictures a second take at most one core of the arena",
        metrics=(
            Metric(name="processor time of the arena", value=found["cpu"], unit="cores", higher_is_better=False),
            as_metric("late answers", late, higher=False),
        ),
        seeds=(options.seed,),
        config=asdict(plan),
        verdict="met" if found["cpu"] <= MOST_CORES else "missed",
    )


def measure(plan: Plan) -> dict[str, Any]:
    """Milliseconds from each observation to its action by way, and the share of a core that the arena took."""
    from offbook.arena.serving import served_apart

    with tempfile.TemporaryDirectory(prefix="offbook-relay-") as folder:
        home = Path(folder) / "arena"
        submit_token, worker_token, entries = _found(home, plan.streams)
        with served_apart(home) as (url, server):
            words = [sys.executable, __file__, "policies", url, submit_token, json.dumps(entries)]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as policies:
                try:
                    address = policies.stdout.readline().strip() if policies.stdout else ""
                    leases = _lease(url, worker_token, entries)
                    before = _processor(server.pid)
                    words = [sys.executable, __file__, "robots", url, worker_token, json.dumps(leases), address]
                    words.append(json.dumps(asdict(plan)))
                    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                    spent = _processor(server.pid) - before
                finally:
                    policies.kill()
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"cpu": spent / plan.seconds}


def _processor(number: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _found(home: Path, streams: int) -> tuple[str, str, list[str]]:
    """An arena with a remote submission for each stream, whose leases need no heartbeat."""
    from offbook.arena import accounts, submissions
    from offbook.arena.accounts import Principal
    from offbook.arena.database import Database
    from offbook.arena.service import Settings

    settings = Settings(folder=home, lease_seconds=86_400.0)
    settings.save()
    database = Database(settings.database_url)
    database.migrate()
    spec = submissions.BenchmarkSpec(
        name="echo", title="Echo", task="answer", metric="none", robot_class="echo",
        splits={"all": [{"scene": {}, "seed": 0}]},
    )  # fmt: skip
    with database.write() as session:
        submissions.define_benchmark(session, spec)
        user = accounts.find_user(session, "ada", create=True)
        who = Principal(user_id=user.id, user="ada", token_id=0, prefix="", scopes=frozenset({"submit"}))
        requests = [submissions.Request(benchmark="echo", name=f"echo {i}", kind="remote") for i in range(streams)]
        entries = [str(submissions.accept(session, who, request).id) for request in requests]
        tokens = [accounts.issue_token(session, user, [scope]) for scope in ("submit", "worker")]
    database.close()
    return tokens[0], tokens[1], entries


def _lease(url: str, token: str, entries: Sequence[str]) -> list[str]:
    """A lease for each submission, as the relay names it."""
    from offbook.client.submit import ArenaClient

    names: list[str] = []
    with ArenaClient(url, token) as arena:
        while len(names) < len(entries):
            body = {"robot": "echo", "worker": f"echo-{len(names)}", "instance": "a", "capabilities": {}}
            status, given = arena.ask("POST", "/v1/leases", json=body)
            if status == 200 and given is not None:
                names.append(f"{given['trial']}.{given['fence']}")
            else:
                time.sleep(0.1)
    return names


# --- the policies' process ----------------------------------------------------------------------------------------


async def _answer(socket: ClientConnection | ServerConnection) -> None:
    chunk = np.zeros((1, META.action.size), np.float32)
    async for frame in socket:
        message = wire.decode(bytes(frame), wire.FRAME_LIMIT)  # type: ignore[arg-type]
        if message["type"] == "obs":
            await socket.send(wire.encode(wire.act(message["session"], message["seq"], chunk)))


async def _policies(url: str, token: str, entries: Sequence[str]) -> None:
    async with (
        serve(_answer, "127.0.0.1", 0, compression=None, max_size=wire.FRAME_LIMIT) as server,
        asyncio.TaskGroup() as tasks,
    ):
        for entry in entries:
            socket = await _dial(f"{url.replace('http', 'ws')}/v1/play", token)
            await socket.send(wire.encode(wire.hello(META, entry, "jpeg")))
            wire.decode(bytes(await socket.recv()), wire.FRAME_LIMIT)  # type: ignore[arg-type]
            tasks.create_task(_answer(socket))
        print(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", flush=True)


# --- the robots' process ------------------------------------------------------------------------------------------


async def _dial(address: str, token: str = "") -> ClientConnection:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return await connect(
        address, additional_headers=headers, proxy=None, compression=None, max_size=wire.FRAME_LIMIT, open_timeout=30
    )


async def _stream(socket: ClientConnection, begin: int, ticks: int, period: float, delay: float) -> list[float]:
    """Sends an observation at each tick and notes when its answer came, in milliseconds; infinite when none came."""
    picture = np.add.outer(np.arange(480), np.arange(640))[..., None].repeat(3, 2).astype(np.uint8)
    seen = Observation(
        sessions=("trial",), state=np.zeros((1, 7), np.float32), images={"front": picture[None]}, time=np.zeros(1)
    )
    message = wire.obs("trial", 0, seen, deadline_ms=1000 * period, images="jpeg")
    sent: dict[int, float] = {}
    took = [np.inf] * ticks

    async def listen() -> None:
        async for frame in socket:
            answer = wire.decode(bytes(frame), wire.FRAME_LIMIT)  # type: ignore[arg-type]
            if answer["type"] == "act" and answer["seq"] in sent:
                took[answer["seq"] - begin] = 1000 * (time.perf_counter() - sent[answer["seq"]])

    listening = asyncio.create_task(listen())
    await asyncio.sleep(delay)
    due = time.perf_counter()
    for seq in range(begin, begin + ticks):
        sent[seq] = time.perf_counter()
        await socket.send(wire.encode(message | {"seq": seq}))
        due += period
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    await asyncio.sleep(1.0)
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    return took


@contextlib.asynccontextmanager
async def _lines(url: str, token: str, leases: Sequence[str], direct: str) -> AsyncIterator[dict[str, list[Any]]]:
    """Open connections of both ways, each with a trial that has begun."""
    ways = {
        "relay": [await _dial(f"{url.replace('http', 'ws')}/v1/relay/{name}", token) for name in leases],
        "direct": [await _dial(direct) for _ in leases],
    }
    for socket in ways["relay"]:
        await socket.recv()
    for socket in (*ways["relay"], *ways["direct"]):
        await socket.send(wire.encode(wire.reset("trial", "answer")))
    yield ways
    for socket in (*ways["relay"], *ways["direct"]):
        await socket.close()


async def _robots(url: str, token: str, leases: Sequence[str], direct: str, plan: Plan) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {"relay": [], "direct": []}
    ticks, period = max(1, round(plan.seconds * plan.rate_hz / plan.turns)), 1 / plan.rate_hz
    async with _lines(url, token, leases, direct) as ways:
        for turn in range(plan.turns):
            for way in ("relay", "direct") if turn % 2 else ("direct", "relay"):
                # Robots do not tick in step: their ticks are spread over the period.
                streams = [
                    _stream(socket, 1 + turn * ticks, ticks, period, i * period / len(leases))
                    for i, socket in enumerate(ways[way])
                ]
                for found in await asyncio.gather(*streams):
                    took[way] += found
    return {way: [min(value, 1e4) for value in values] for way, values in took.items()}


if __name__ == "__main__":
    what, where, secret, listed, *rest = sys.argv[1:]
    if what == "policies":
        asyncio.run(_policies(where, secret, json.loads(listed)))
    else:
        print(json.dumps(asyncio.run(_robots(where, secret, json.loads(listed), rest[0], Plan(**json.loads(rest[1]))))))
