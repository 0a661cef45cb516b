"""A rating service in this process: its owner, its raters, and scripts that judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import literal

from offbook.rating.app import Database, rating_app
from offbook.rating.studies import hash_token
from offbook.service.storage import BlobStore

API = "/api/rating/v1"
OWNER = "ro_of-the-tests"

Prefer = Callable[[dict[str, Any]], str]
"""Says `left`, `right`, `tie`, `both_bad` or `skip` of what a rater is shown."""


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.seconds = 1_790_000_000.0

    def __call__(self):
        return literal(self.seconds)


class World(TestClient):
    """A visitor of a rating service; without a token a stranger."""

    def ask(self, method: str, path: str, token: str | None = None, **options: Any) -> Response:
        headers = dict(options.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return self.request(method, path if path.startswith("/") else f"{API}/{path}", headers=headers, **options)

    def own(self, method: str, path: str, **options: Any) -> Any:
        """What the owner asks, and is not refused."""
        answer = self.ask(method, path, OWNER, **options)
        assert answer.is_success, answer.text
        return answer.json()

    def draft(self, records: Iterable[dict[str, Any]], files: Sequence[Path] = (), **design: Any) -> int:
        """A study with outputs that is not open yet."""
        wanted = {"name": "s", "question": "Which is better?", "modality": "text", "min_dwell_s": 0} | design
        study = self.own("POST", "studies", json=wanted)["id"]
        self.hand_in(study, records, files)
        return int(study)

    def hand_in(self, study: int, records: Iterable[dict[str, Any]], files: Sequence[Path] = ()) -> dict[str, int]:
        parts = [("records", ("outputs.jsonl", jsonl(records), "application/x-ndjson"))]
        parts += [("files", (path.name, path.read_bytes(), "application/octet-stream")) for path in files]
        return self.own("POST", f"studies/{study}/outputs", files=parts)

    def study(self, records: Iterable[dict[str, Any]], files: Sequence[Path] = (), **design: Any) -> int:
        """An open study."""
        study = self.draft(records, files, **design)
        self.own("POST", f"studies/{study}/open")
        return study

    def invite(self, study: int, count: int = 1, kind: str = "script", cohort: str = "") -> list[str]:
        wanted = {"count": count, "kind": kind, "cohort": cohort}
        return [row["token"] for row in self.own("POST", f"studies/{study}/raters", json=wanted)["raters"]]

    def judge(self, token: str, prefer: Prefer, most: int = 10_000, **more: Any) -> int:
        """Lets a script judge all that is left for it."""
        for count in range(most):
            given = self.ask("GET", "next", token).json()
            if given.get("done"):
                return count
            body = {"nonce": given["nonce"], "choice": prefer(given)} | more
            answer = self.ask("POST", f"assignments/{given['assignment']}/vote", token, json=body)
            assert answer.status_code == 200, answer.text
        return most

    def votes(self, study: int) -> list[dict[str, Any]]:
        answer = self.ask("GET", f"studies/{study}/export", OWNER)
        assert answer.status_code == 200, answer.text
        return [json.loads(line) for line in answer.text.splitlines()]


def jsonl(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def texts(systems: Sequence[str] = ("alpha", "beta"), items: int = 4, gold: int = 0) -> list[dict[str, Any]]:
    """Answers of systems, the first of which is the best: the number in a text is how good it is."""
    records = [
        {"item": f"question-{i}", "system": system, "prompt": f"What is {i}?", "text": f"{len(systems) - k} of {i}"}
        for i in range(items)
        for k, system in enumerate(systems)
    ]
    for i in range(gold):
        for system, words, mark in (("good", "9 of", "better"), ("spoilt", "0 of", "worse")):
            text = f"{words} known {i}"
            records.append({"item": f"known-{i}", "system": system, "prompt": "?", "text": text, "gold": mark})
    return records


def by_number(given: dict[str, Any]) -> str:
    """Prefers the text that begins with the larger number."""
    left, right = (float(given[side]["text"].split()[0]) for side in ("left", "right"))
    return "tie" if left == right else "left" if left > right else "right"


def open_world(database: Database, folder: Path) -> World:
    return World(
        rating_app(database, BlobStore(str(folder)), hash_token(OWNER)),
        raise_server_exceptions=False,
        follow_redirects=False,
    )
