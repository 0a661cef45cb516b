"""How long the pages of a large arena take, and how fast it gives out trials.

It has 1,000 users, 10,000 submissions and 50,000 trials. A tenth of the submissions wait, some of these for policies
that are not connected. Pages and leases come from a server in a process of its own, over HTTP on loopback. Limits, for
two idle cores: the leaderboard and the queue within 150 ms in 95 of 100 cases, and no more than 100 kB of each; 100
leases a second to eight workers that ask at the same time.
"""

import gzip
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from sqlalchemy import insert

from offbook.errors import OffbookError
from offbook.runs.benchmark import Options, quantile_metric
from offbook.runs.ledger import Claim, Metric

PAGES = {"leaderboard": "/benchmarks/swing", "queue": "/queue", "submission": "/submissions/7", "first": "/"}
LIMITED = ("leaderboard", "queue")
MOST_MS, MOST_BYTES = 150.0, 100_000
WORKERS, LEAST_LEASES = 8, 100.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the arena is, and how often each page is asked for.

    Attributes:
        users: who submitted.
        submissions: of all users together.
        trials: of each submission.
        requests: of each page.
        rounds: in each of them every worker asks for one trial, and gives it back afterwards.
        database: its address; SQLite in the arena's folder when empty.
    """

    users: int = 1000
    submissions: int = 10_000
    trials: int = 5
    requests: int = 100
    rounds: int = 20
    database: str = ""


def run(options: Options) -> list[Claim]:
    plan = Plan()
    found = measure(plan, options.seed)
    worst = {name: float(np.percentile(found[name]["ms"], 95)) for name in PAGES}
    met = all(worst[name] <= MOST_MS and found[name]["bytes"] <= MOST_BYTES for name in LIMITED)
    metrics = [quantile_metric(f"{name}, 95th percentile", found[name]["ms"], 0.95, unit="ms") for name in PAGES]
    metrics += [
        Metric(name=f"{name}, compressed", value=found[name]["bytes"], unit="B", higher_is_better=False)
        for name in LIMITED
    ]
    return [
        Claim(
            system="arena",
            claim="leaderboard and queue of an arena with 1,000 users, 10,000 submissions and 50,000 trials: 95 of 100 "
            "requests within 150 ms, 100 kB each",
            metrics=tuple(metrics),
            seeds=(options.seed,),
            config=asdict(plan),
            verdict="met" if met else "missed",
        ),
        Claim(
            system="arena",
            claim=f"the same arena gives {LEAST_LEASES:g} leases a second to {WORKERS} workers that ask at once",
            metrics=(
                Metric(name="leases a second", value=found["leases"]["rate"], higher_is_better=True),
                quantile_metric("lease, median", found["leases"]["ms"], 0.5, unit="ms"),
            ),
            seeds=(options.seed,),
            config=asdict(plan),
            verdict="met" if found["leases"]["rate"] >= LEAST_LEASES else "missed",
        ),
    ]


def measure(plan: Plan, seed: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each request by page, and the bytes of the page when compressed; of leases, and their rate."""
    from offbook.arena.serving import served_apart

    with tempfile.TemporaryDirectory(prefix="offbook-pages-") as folder:
        home = Path(folder) / "arena"
        token = fill(home, plan, seed)
        found: dict[str, dict[str, Any]] = {}
        with served_apart(home) as (url, _), httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            for name, path in PAGES.items():
                content, took = client.get(path, headers={"Accept": "text/html"}).content, []
                for _ in range(plan.requests):
                    began = time.perf_counter()
                    client.get(path, headers={"Accept": "text/html"}).raise_for_status()
                    took.append(1000 * (time.perf_counter() - began))
                found[name] = {"ms": took, "bytes": len(gzip.compress(content))}
            found["leases"] = _leases(url, token, plan.rounds)
    return found


def _leases(url: str, token: str, rounds: int) -> dict[str, Any]:
    """Leases a second while workers wait for nothing else, and how long each of them waited."""
    from offbook.client.submit import ArenaClient

    lines = [ArenaClient(url, token) for _ in range(WORKERS)]
    took: list[float] = []
    spent = 0.0

    def ask(worker: int) -> dict[str, Any]:
        body = {"robot": "swing", "worker": f"bench-{worker}", "instance": "a", "capabilities": {}}
        began = time.perf_counter()
        status, given = lines[worker].ask("POST", "/v1/leases", json=body)
        took.append(1000 * (time.perf_counter() - began))
        if status != 200 or given is None:
            raise OffbookError(
                f"lease of worker {worker}", expected="a trial", got=f"HTTP status {status}", fix="look why"
            )
        return given

    def give_back(worker: int, given: dict[str, Any]) -> None:
        body = {"fence": given["fence"], "kind": "released", "reason": "it was asked for to measure"}
        lines[worker].request("POST", f"/v1/trials/{given['trial']}/fault", json=body)

    with ThreadPoolExecutor(WORKERS) as pool:
        for turn in range(rounds + 1):  # in the first the robots are new, and the connections
            began = time.perf_counter()
            given = list(pool.map(ask, range(WORKERS)))
            spent += (time.perf_counter() - began) * (turn > 0)
            list(pool.map(give_back, range(WORKERS), given))
    for line in lines:
        line.close()
    return {"ms": took[WORKERS:], "rate": rounds * WORKERS / spent}


def fill(home: Path, plan: Plan, seed: int) -> str:
    """An arena that has been used for long; gives a worker's token."""
    from offbook.arena import accounts, submissions
    from offbook.arena.database import Database
    from offbook.arena.service import Settings
    from offbook.arena.tables import Attempt, Result, Robot, Submission, Trial, User, Worker

    settings = Settings(folder=home, database=plan.database)
    settings.save()
    database = Database(settings.database_url)
    database.migrate()
    spec = submissions.BenchmarkSpec(
        name="swing", title="Swing", task="swing", metric="share", robot_class="swing", score_range=(0.0, 1.0),
        splits={"all": [{"scene": {"x": i}, "seed": i} for i in range(plan.trials)]},
    )  # fmt: skip
    draw, moment = random.Random(seed), time.time()
    with database.write() as session:
        submissions.define_benchmark(session, spec)
        users = [{"name": f"user {i}", "daily_trials": 400, "created": moment} for i in range(plan.users)]
        session.execute(insert(User), users)
        robots = [
            {"name": f"arm-{i}", "robot_class": "swing", "spec": {"rate_hz": 30}, "created": moment, "seen": moment}
            for i in range(8)
        ]
        session.execute(insert(Robot), robots)
        workers = [
            {"name": each["name"], "robot_id": i, "user_id": 1, "instance": "a", "created": moment, "seen": moment}
            for i, each in enumerate(robots, start=1)
        ]
        session.execute(insert(Worker), workers)
        entries = list(_entries(plan, draw, moment))
        session.execute(insert(Submission), entries)
        cells = list(_trials(entries, plan.trials))
        session.execute(insert(Trial), cells)
        played = [(i, cell) for i, cell in enumerate(cells, start=1) if cell["state"] == "done"]
        session.execute(insert(Result), [_result(i, cell, draw, moment) for i, cell in played])
        session.execute(insert(Attempt), [_attempt(i, cell, entries, draw, moment) for i, cell in played])
        token = accounts.issue_token(session, accounts.find_user(session, "lab", create=True), ["worker"])
    database.close()
    return token


def _entries(plan: Plan, draw: random.Random, moment: float) -> Iterator[dict[str, Any]]:
    for i in range(plan.submissions):
        waits, score = draw.random() < 0.1, draw.random()
        figures = {"n": plan.trials, "judged": plan.trials, "successes": draw.randint(0, plan.trials), "score": score}
        figures |= {"score_low": max(0.0, score - 0.2), "score_high": min(1.0, score + 0.2)}
        none = dict.fromkeys(("score", "score_low", "score_high", "successes")) | {"n": 0, "judged": 0}
        yield {
            "user_id": 1 + i % plan.users, "split_id": 1, "robot_class": "swing", "name": f"policy {i}",
            "kind": "remote" if i % 20 == 19 else "checkpoint", "method": "cloning", "imitates": "the expert",
            "state": "open" if waits else "done", "wanted": plan.trials, "commitment": "0" * 64, "nonce": "0" * 32,
            "created": moment - 60.0 * i, "latency_ms": 2.0, "late_share": 0.01, **(none if waits else figures),
        }  # fmt: skip


def _trials(entries: Sequence[dict[str, Any]], each: int) -> Iterator[dict[str, Any]]:
    for entry, about in enumerate(entries, start=1):
        done = about["state"] == "done"
        for slot in range(each):
            yield {
                "submission_id": entry, "slot": slot, "position": slot, "pair_id": f"swing.1/all/{slot}",
                "blind_label": "policy 000000", "scene": {"x": slot}, "seed": slot,
                "state": "done" if done else "queued", "attempt": int(done), "faults": 0, "fence": int(done),
                "robot_id": 1 + entry % 8 if done else None,
            }  # fmt: skip


def _result(trial: int, cell: dict[str, Any], draw: random.Random, moment: float) -> dict[str, Any]:
    score = draw.random()
    return {
        "trial_id": trial, "submission_id": cell["submission_id"], "attempt": 1, "outcome": "done", "reason": "",
        "score": score, "success": score > 0.5, "steps": 100, "latency_ms": 2.0, "late_share": 0.01, "files": [],
        "created": moment,
    }  # fmt: skip


def _attempt(
    trial: int, cell: dict[str, Any], entries: Sequence[dict[str, Any]], draw: random.Random, moment: float
) -> dict[str, Any]:
    leased = moment - draw.uniform(0, 14 * 86_400)
    return {
        "trial_id": trial, "n": 1, "fence": 1, "user_id": entries[cell["submission_id"] - 1]["user_id"],
        "robot_id": cell["robot_id"], "worker_id": cell["robot_id"], "robot_class": "swing", "leased": leased,
        "started": leased + 0.1, "ended": leased + 4.0, "outcome": "done", "reason": "", "start_tag": float(trial),
        "finish_tag": float(trial) + 4.0,
    }  # fmt: skip
