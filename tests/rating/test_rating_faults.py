"""The service is killed while raters vote: what was acknowledged is there, and there once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from rating_world import API, by_number, jsonl, texts

from killing import SERVER
from offbook.rating.app import Settings
from offbook.rating.exports import export_votes
from offbook.rating.studies import find

pytestmark = [pytest.mark.service, pytest.mark.faults]


SERVE = """
import sys
from pathlib import Path
from offbook.rating.app import Settings, rating_app
from offbook.service.serving import Server

def begin():
    settings = Settings.load(Path(sys.argv[1]))
    app = lambda: rating_app(*settings.open(), settings.owner)
    Server(app, lambda url: announce(0), port=int(sys.argv[2])).serve_here()
"""


class Served:
    """A service in a process of its own that is killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port, self.kills, self._child = free.getsockname()[1], 0, 0
        command = [sys.executable, "-c", SERVE + SERVER, str(folder), str(self.port)]
        self._forge = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self) -> None:
        self._forge.stdin.write("\n")
        self._forge.stdin.flush()
        self._child = int(self._forge.stdout.readline().removeprefix("child "))
        assert self._forge.stdout.readline() == "0\n", "the service did not start"

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)
        assert self._forge.stdout.readline() == "dead\n"
        self.kills += 1

    def end(self) -> None:
        self.kill()
        self._forge.communicate()


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    served = Served(folder)
    served.start()
    try:
        yield served
    finally:
        served.end()


class Judge(threading.Thread):
    """A scripted rater that never gives up, and remembers what was acknowledged."""

    def __init__(self, served: Served, token: str, pause: float) -> None:
        super().__init__(daemon=True)
        self._served, self._pause = served, pause
        self._headers = {"Authorization": f"Bearer {token}"}
        self.acknowledged: list[tuple[str, str]] = []
        self.seconds: list[float] = []
        self.complaint = ""

    def run(self) -> None:
        with httpx.Client(headers=self._headers, timeout=10, trust_env=False) as http:
            while not self.complaint:
                given = self._ask(http, "GET", "next")
                if given is None or given.get("done"):
                    return
                body = {"nonce": given["nonce"], "choice": by_number(given)}
                if self._ask(http, "POST", f"assignments/{given['assignment']}/vote", json=body) is None:
                    return
                self.acknowledged.append((given["left"]["text"], body["choice"]))
                time.sleep(self._pause)

    def _ask(self, http: httpx.Client, method: str, path: str, **options) -> dict | None:
        for _ in range(300):
            began = time.perf_counter()
            try:
                answer = http.request(method, f"http://127.0.0.1:{self._served.port}{API}/{path}", **options)
            except httpx.HTTPError:
                time.sleep(0.1)
                continue
            if method == "GET":
                self.seconds.append(time.perf_counter() - began)
            if answer.status_code == 200:
                return answer.json()
            self.complaint = f"{method} {path}: {answer.status_code} {answer.text}"
            return None
        self.complaint = "no answer for too long"
        return None


def soak(folder: Path, cli, *, items: int, judges: int, kills: int, every: float, pause: float) -> list[Judge]:
    """Raters judge all pairs of a study while its service is killed now and then; returns them when all is judged."""
    outputs = folder / "outputs.jsonl"
    outputs.write_bytes(jsonl(texts(("best", "fair", "poor"), items=items)))
    words = ["--raters", str(judges), "--kind", "script", "--open", "--name", "soak", "--json"]
    design = folder / "design.json"
    design.write_text(json.dumps({"repeat_rate": 0.0, "gold_rate": 0.0, "raters_per_pair": 3}))
    made = cli(["rating", "import", str(outputs), "--folder", str(folder / "r"), "--design", str(design), *words])
    assert made.exit_code == 0, made.stderr
    tokens = [link.split("#")[1] for link in json.loads(made.stdout)["invitations"]]
    with serving(folder / "r") as served:
        crew = [Judge(served, token, pause) for token in tokens]
        for judge in crew:
            judge.start()
        for _ in range(kills):
            time.sleep(every)
            served.kill()
            before = sum(len(judge.acknowledged) for judge in crew)
            served.start()
        for judge in crew:
            judge.join(240)
    assert served.kills == kills + 1
    assert 0 < before < sum(len(judge.acknowledged) for judge in crew), "nobody voted before or after the last kill"
    assert [judge.complaint for judge in crew if judge.complaint] == []
    return crew


def check(folder: Path, crew: list[Judge], pairs: int) -> None:
    database, _ = Settings.load(folder / "r").open()
    with database.read() as session:
        votes = export_votes(session, find(session, 1))
    database.close()
    kept = Counter(vote.rater for vote in votes)
    assert kept == {f"r{n}": len(judge.acknowledged) for n, judge in enumerate(crew) if judge.acknowledged}
    # Every acknowledged vote is there as it was given, in its order, once.
    worth = {"best": "3", "fair": "2", "poor": "1"}
    for n, judge in enumerate(crew):
        given = [(f"{worth[vote.left]} of {vote.item.rpartition('-')[2]}", vote.choice) for vote in votes
                 if vote.rater == f"r{n}"]  # fmt: skip
        assert given == judge.acknowledged
    assert Counter(Counter(vote.pair for vote in votes).values()) == {3: pairs}
    assert len({(vote.pair, vote.rater) for vote in votes}) == len(votes)


def test_a_killed_service_loses_no_acknowledged_vote_and_doubles_none(tmp_path: Path, cli) -> None:
    crew = soak(tmp_path, cli, items=12, judges=4, kills=2, every=1.0, pause=0.05)
    check(tmp_path, crew, pairs=36)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_raters_give_two_thousand_votes_under_fire(tmp_path: Path, cli) -> None:
    """People think for a second or more; 50 of them who answer after 2 s ask for about 25 pairs a second."""
    crew = soak(tmp_path, cli, items=223, judges=50, kills=5, every=8.0, pause=2.0)
    check(tmp_path, crew, pairs=669)
    seconds = sorted(second for judge in crew for second in judge.seconds)
    middle, high = (1000 * seconds[int(share * len(seconds))] for share in (0.5, 0.95))
    print(f"next: median {middle:.0f} ms, 95 of 100 within {high:.0f} ms")
