"""A small world for the arena's tests: one benchmark, some users, and short ways to do what workers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import literal
from sqlalchemy.orm import Session

from offbook.arena import accounts, scheduler, submissions, trials
from offbook.arena.accounts import Principal, find_user
from offbook.arena.app import create_app
from offbook.arena.database import Database
from offbook.arena.service import Settings
from offbook.arena.tables import Submission


class VirtualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self):
        return literal(self.seconds)


BENCHMARK = submissions.BenchmarkSpec(
    name="reach",
    title="Reach",
    task="reach the mark",
    metric="1 when reached",
    robot_class="arm",
    splits={
        "seen": [{"scene": {"mark": i}, "seed": 100 + i} for i in range(4)],
        "far": [{"scene": {"mark": i + 10}, "seed": 200 + i} for i in range(4)],
        "long": [{"scene": {"mark": i + 20}, "seed": 300 + i} for i in range(8)],
    },
    trial_seconds=10.0,
    daily_trials=10_000,
)


def who(session: Session, name: str = "ada", *scopes: str) -> Principal:
    """A principal as a token of this user would give."""
    user = find_user(session, name, create=True)
    user.daily_trials = 10_000
    return Principal(
        user_id=user.id, user=name, token_id=0, prefix="0" * 8, scopes=frozenset(scopes or ("submit", "worker"))
    )


def submit(session: Session, user: str = "ada", *, kind: str = "remote", **request: Any) -> Submission:
    """A submission on the first split."""
    request = {"benchmark": "reach", "name": f"{user}'s policy", "kind": kind} | request
    principal = who(session, user, *(("admin",) if kind == "anchor" else ("submit",)))
    return submissions.accept(session, principal, submissions.Request(**request))


def submit_pair(session: Session, *kinds: str, trials: int | None = None, user: str = "ada") -> list[int]:
    """Two submissions that are compared, by default anchors."""
    principal = who(session, user, "admin")
    requests = [
        submissions.Request(
            benchmark="reach", name=f"{kind} {i}", kind=kind, anchor="random" if kind == "anchor" else None,
            trials=trials,
        )
        for i, kind in enumerate(kinds or ("anchor", "anchor"))
    ]  # fmt: skip
    return [each.id for each in submissions.accept_pair(session, principal, *requests)]


def lease(
    session: Session, worker: str = "arm-1", *, instance: str = "first", robot_class: str = "arm", **options: Any
) -> dict[str, Any] | None:
    """What this worker is given."""
    applicant = scheduler.Applicant(
        user_id=who(session, "lab").user_id, worker=worker, instance=instance, robot_class=robot_class, spec={}
    )
    return scheduler.lease(session, applicant, **options)


DONE = trials.Report(outcome="done", score=0.5, success=True, steps=10, latency_ms=3.0, late_share=0.0)
FAULT = trials.Report(outcome="robot_fault", reason="camera lost")
LEFT = trials.Report(outcome="policy_fault", reason="the policy hung up")


def play(session: Session, given: dict[str, Any], report: trials.Report = DONE) -> dict[str, Any]:
    """Starts and ends a leased trial."""
    trials.start(session, given["trial"], given["fence"])
    return trials.end(session, given["trial"], given["fence"], report)


class Client(TestClient):
    """A visitor of an arena that runs in this process, with a token for each kind of visitor."""

    tokens: ClassVar[dict[str, str]] = {}

    def ask(self, method: str, path: str, role: str | None = None, **options: Any) -> Response:
        """A request with the token of a role: admin, ada, bob or lab (a worker)."""
        headers = dict(options.pop("headers", {}))
        if role is not None:
            headers["Authorization"] = f"Bearer {self.tokens[role]}"
        return self.request(method, path, headers=headers, **options)


ROLES = {
    "admin": ("root", "admin"),
    "ada": ("ada", "submit"),
    "bob": ("bob", "submit"),
    "lab": ("lab", "worker"),
}


def open_arena(database: Database, folder: Path, **settings: Any) -> Client:
    """An application on a database with the small benchmark and a token for each role."""
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
        tokens = {}
        for role, (user, *scopes) in ROLES.items():
            tokens[role] = accounts.issue_token(session, accounts.find_user(session, user, create=True), scopes)
    client = Client(create_app(Settings(folder=folder, **settings), database), raise_server_exceptions=False)
    client.tokens = tokens
    return client
